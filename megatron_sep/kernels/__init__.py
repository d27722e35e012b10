"""How attention and the operations around it are computed fast; each kernel stands beside its plain reference."""
