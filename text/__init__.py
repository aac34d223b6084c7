"""Chat messages to token ids and back: assets, tokenizer, template, detokenizer, stops."""
