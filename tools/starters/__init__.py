"""How the bundled starters were trained."""
