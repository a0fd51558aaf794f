"""Janus on Ray: collect values, train a policy on them, serve it, measure it.

The layers import one way only (`lint-imports` proves it):

    jobs -> data | train | serve | eval -> llm -> chat | cluster | job | progress | prompts | stats -> store
         -> config | metrics -> env -> records -> text | errors

Importing this package, `records`, `config`, `stats` or `metrics` loads neither torch, ray, vllm nor transformers.
"""

__version__ = "0.3.0"
