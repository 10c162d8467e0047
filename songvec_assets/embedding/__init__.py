"""How texts become vectors: the provider, its quota, its price."""
