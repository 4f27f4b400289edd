"""Cascades: from unlabelled pictures to how sure a cheap answer must be."""
