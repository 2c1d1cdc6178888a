"""Words to numbers: tokenizers and text encoders, read from folders as they are published."""

from pipeline.text.encoders import Encoded, TextEncoder, load_encoder
from pipeline.text.tokens import Tokenizer, Tokens, load_tokenizer

__all__ = ["Encoded", "TextEncoder", "Tokenizer", "Tokens", "load_encoder", "load_tokenizer"]
