// A prompt, n branches, each in its own card as it streams.

export class Playground {
  constructor(root) {
    this.find = (id) => root.getElementById(id);
    this.abort = null;
    this.model = null;
    this.find("play").addEventListener("submit", (event) => { event.preventDefault(); this.run(); });
    this.find("stop").addEventListener("click", () => this.abort?.abort());
  }

  async run() {
    const read = (id) => Number(this.find(id).value), count = read("branches");
    const body = {
      model: this.model, messages: [{ role: "user", content: this.find("prompt").value }],
      n: count, max_tokens: read("tokens"), temperature: read("temperature"), stream: true,
    };
    const key = this.find("key").value, headers = { "Content-Type": "application/json" };
    if (key) headers.Authorization = `Bearer ${key}`;
    this.abort = new AbortController();
    this.busy(true);
    this.open(count);
    try {
      const answer = await fetch("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal: this.abort.signal });
      if (!answer.ok) throw new Error(await reason(answer));
      for await (const chunk of events(answer.body)) this.take(chunk);
      this.say(this.total("done"));
    } catch (error) {
      this.say(error.name === "AbortError" ? this.total("stopped") : `The server refused: ${error.message}`, error.name !== "AbortError");
    }
    this.cards.forEach((card) => card.item.classList.add("done"));
    this.busy(false);
  }

  open(count) {
    this.started = performance.now();
    this.cards = Array.from({ length: count }, (_, index) => {
      const item = document.createElement("li"), title = document.createElement("h3"), text = document.createElement("p");
      const name = Object.assign(document.createElement("span"), { textContent: `Branch ${index + 1}` });
      const tokens = document.createElement("span");
      text.tabIndex = 0;
      title.append(name, tokens);
      item.append(title, text);
      return { item, text, tokens, count: 0, fresh: "" };
    });
    this.find("outputs").replaceChildren(...this.cards.map((card) => card.item));
    this.say("waiting for the first token");
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message ?? "the stream broke off");
    for (const choice of chunk.choices ?? []) {
      const card = this.cards[choice.index];
      if (choice.delta?.content) {
        card.fresh += choice.delta.content;
        card.count += 1;
      }
      if (choice.finish_reason) card.item.classList.add("done");
    }
    if (!this.drawing) this.drawing = requestAnimationFrame(() => this.draw());
  }

  // At most once a frame, however many chunks came.
  draw() {
    this.drawing = 0;
    for (const card of this.cards) {
      if (!card.fresh) continue;
      card.text.append(card.fresh);
      card.text.scrollTop = card.text.scrollHeight;
      card.tokens.textContent = `${card.count} tokens`;
      card.fresh = "";
    }
  }

  total(how) {
    const tokens = this.cards.reduce((sum, card) => sum + card.count, 0), seconds = (performance.now() - this.started) / 1000;
    return `${how}: ${tokens} tokens in ${seconds.toFixed(1)} s, ${(tokens / seconds).toFixed(0)} tokens per second`;
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
