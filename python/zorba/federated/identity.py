"""Names that moved to ``zorba.identity``."""

from zorba.identity import MAX_BLOCKS, ModelIdentity, identity_of

__all__ = ["MAX_BLOCKS", "ModelIdentity", "identity_of"]
