"""OpenAI's Responses API on top of the chat: items become messages, answers are stored and can be gone on from."""
