"""The decoder.

Array names end in their dims, one letter each:
    B batch   T sequence (queries)   S sequence (keys)   D model   F MLP hidden   V vocabulary
    H query heads   G key/value heads   R query heads a key/value head   K head   L layers
"""

from maxlm.model.transformer import Transformer, make_transformer

__all__ = ["Transformer", "make_transformer"]
