"""`vlmprune bench`, whose WHATs are in files of their own."""

HELP = "time models, or the choice of tokens alone, at many sizes"
EXAMPLES = """\
examples:
  vlmprune bench model
      12 layers of width 1024 and 576 visual tokens, random weights
  vlmprune bench model --shape qwen2.5-vl-7b --methods divprune --budgets 0.333,0.111
  vlmprune bench model --shape llava-next-small --batch_size 8
  vlmprune bench model --methods divprune fastv --budgets 0.25 --layers 4 --repeats 5
  vlmprune bench model --methods divprune@0.5+fastv@0.25 --new_tokens 64 --memory
  vlmprune bench select
      time of choosing, of every method before the LLM, beside a plain transcription
  vlmprune bench scale --methods divprune fastv --tokens 256,1024,4096
      how time and memory of choosing grow with the number of visual tokens
  vlmprune bench serve --methods divprune --budgets 0.11 --concurrency 1,4,16
      requests a second and waiting times of a model that threads share, dense beside patched
"""
