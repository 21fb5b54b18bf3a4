"""Which keys each head attends to: catalog, plan, online selection, and the compiler to tile programs."""
