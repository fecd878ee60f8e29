"""The ways from logits to text: token by token, speculated, compiled, in int8; and models of others."""
