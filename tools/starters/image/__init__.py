"""How the bundled image models were trained."""
