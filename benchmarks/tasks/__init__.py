"""The paper's diffusion tasks: how what came of them is shown."""
