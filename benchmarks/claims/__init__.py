"""The paper's claims at a size that runs on two cores: what is run, what it is compared with, how it is shown."""
