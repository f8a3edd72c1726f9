"""How the bundled text models were trained."""
