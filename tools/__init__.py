"""Not part of the wheel: how the bundled models were trained, and closed forms for the tests."""
