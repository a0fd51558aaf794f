"""The one seam to a language model: requests, retries, the ledger and structured answers."""
