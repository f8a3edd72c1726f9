"""Where units run: this process, local workers, or a cluster."""
