"""From a request to token ids, exactly as the engine sees them.

tokenization = make_tokenization(load_config("kvatlas.yaml").tokens, Metrics())
tokens = tokenization.tokenize(ChatPrompt(model="llama", messages=[{"role": "user", "content": "Hello"}]))
best = indexer.score(Query(tokens.token_ids, model="llama", multimodal=tokens.multimodal)).pods[0]
"""

from kvatlas.tokens.pending import PendingTokens
from kvatlas.tokens.prompts import ChatPrompt, Prompt, TextPrompt, Truncation
from kvatlas.tokens.results import Backend, Estimate, Tokenized, TokenSource
from kvatlas.tokens.setup import make_tokenization
from kvatlas.tokens.tokenization import Policy, Tokenization, Waiting, estimate

__all__ = [
    "Backend",
    "ChatPrompt",
    "Estimate",
    "PendingTokens",
    "Policy",
    "Prompt",
    "TextPrompt",
    "TokenSource",
    "Tokenization",
    "Tokenized",
    "Truncation",
    "Waiting",
    "estimate",
    "make_tokenization",
]
