"""The chain of trust: where an artifact comes from (statement), what is in it (bom), and whose word that is (signature)."""
