// A prompt and its branches, each in its own card as it streams: n samples, or a program that forks and joins.

const ROOT = "0"; // of a program's branches
const program = (protocol, options) => ({ taper: { protocol, options, order: "interleaved", on_branch_error: "skip" } });

// What is asked for under each choice of protocol, and how many branches it can have. None needs a trained model.
const CHOICES = {
  "off": { least: 1, most: 32, ask: (branches, tokens) => ({ n: branches, max_tokens: tokens }) },
  "skeleton-of-thought": {
    least: 2, most: 10, ask: (branches, tokens) => program("skeleton-of-thought", { max_points: branches, point_tokens: tokens }),
  },
  "scripted": {
    least: 1, most: 32,
    ask: (branches, tokens) => program("scripted", { lead_tokens: tokens, stages: [{ branches, tokens, then_tokens: tokens }] }),
  },
};

export class Playground {
  constructor(root) {
    this.find = (id) => root.getElementById(id);
    this.abort = null;
    this.model = null;
    this.find("play").addEventListener("submit", (event) => { event.preventDefault(); this.run(); });
    this.find("stop").addEventListener("click", () => this.abort?.abort());
    this.find("protocol").addEventListener("change", () => this.choose());
    this.choose();
  }

  // The branches stay within what the protocol allows.
  choose() {
    const { least, most } = CHOICES[this.find("protocol").value], box = this.find("branches");
    box.min = least;
    box.max = most;
    box.value = Math.min(Math.max(box.value, least), most);
  }

  async run() {
    const read = (id) => Number(this.find(id).value), protocol = this.find("protocol").value;
    const body = {
      model: this.model, messages: [{ role: "user", content: this.find("prompt").value }], temperature: read("temperature"),
      stream: true, stream_options: { include_usage: true }, ...CHOICES[protocol].ask(read("branches"), read("tokens")),
    };
    const key = this.find("key").value, headers = { "Content-Type": "application/json" };
    if (key) headers.Authorization = `Bearer ${key}`;
    this.abort = new AbortController();
    this.busy(true);
    this.open(body.n ?? 0);
    let words, isBad = false;
    try {
      const answer = await fetch("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal: this.abort.signal });
      if (!answer.ok) throw new Error(await reason(answer));
      for await (const chunk of events(answer.body)) this.take(chunk);
      isBad = this.failure !== null;
      words = isBad ? `done in part, ${this.failure}; ${this.total()}` : `done: ${this.total()}`;
    } catch (error) {
      isBad = error.name !== "AbortError";
      words = isBad ? `Failed: ${error.message}` : `stopped: ${this.total()}`;
    }
    this.draw();
    for (const card of this.cards.values()) {
      if (!card.item.classList.contains("done")) this.end(card, "cut short");
    }
    this.say(words, isBad);
    this.busy(false);
  }

  // Samples are known beforehand; the branches of a program come as it forks.
  open(samples) {
    this.started = performance.now();
    this.tokens = this.failure = null;
    this.cards = new Map();
    this.find("outputs").replaceChildren();
    for (let index = 0; index < samples; index++) this.card(String(index), `Branch ${index + 1}`);
    this.say("waiting for the first token");
  }

  card(id, name) {
    if (!this.cards.has(id)) {
      const item = document.createElement("li"), title = document.createElement("h3"), text = document.createElement("p");
      const state = Object.assign(document.createElement("span"), { textContent: "running" });
      text.tabIndex = 0;
      title.append(Object.assign(document.createElement("span"), { textContent: name }), state);
      item.append(title, text);
      this.find("outputs").append(item);
      this.cards.set(id, { item, text, state, fresh: "" });
    }
    return this.cards.get(id);
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message ?? "the stream broke off");
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
    for (const choice of chunk.choices ?? []) {
      const fact = chunk.taper;
      if (fact?.status) { // how the whole program ended
        this.failure = fact.failure;
        continue;
      }
      const card = fact ? this.card(fact.branch, fact.branch === ROOT ? "Root" : `Branch ${fact.label}`) : this.cards.get(String(choice.index));
      card.item.classList.toggle("root", fact?.branch === ROOT);
      card.fresh += choice.delta?.content || fact?.text || "";
      const ending = fact ? fact.detail || fact.finish_reason : choice.finish_reason;
      if (ending) this.end(card, ending);
    }
    if (!this.drawing) this.drawing = requestAnimationFrame(() => this.draw());
  }

  end(card, how) {
    card.item.classList.add("done");
    card.state.textContent = how;
  }

  // At most once a frame, however many chunks came.
  draw() {
    this.drawing = 0;
    for (const card of this.cards.values()) {
      if (!card.fresh) continue;
      card.text.append(card.fresh);
      card.text.scrollTop = card.text.scrollHeight;
      card.fresh = "";
    }
  }

  total() {
    const seconds = (performance.now() - this.started) / 1000, took = `${seconds.toFixed(1)} s`;
    if (this.tokens === null) return took; // the count comes last
    return `${this.tokens} tokens in ${took}, ${(this.tokens / seconds).toFixed(0)} tokens per second`;
  }

  say(text, isBad = false) {
    const note = this.find("play-note");
    note.textContent = text;
    note.classList.toggle("bad", isBad);
  }

  busy(is) { this.find("go").disabled = is; this.find("stop").disabled = !is; }
}

// The data lines of a server-sent event stream, as JSON.
async function* events(stream) {
  const lines = stream.pipeThrough(new TextDecoderStream());
  const reader = lines.getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const line of parts) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

export async function reason(answer) {
  const body = await answer.json().catch(() => null);
  const error = body?.error;
  return `HTTP ${answer.status}: ${error?.message ?? error ?? answer.statusText}`;
}
