"""Open-loop load over HTTP with the stock `openai` client, and what it saw."""
