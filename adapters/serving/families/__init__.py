"""Models of vLLM that prune, one file per `model_type`; the only files that import vLLM at their
heads. vLLM itself loads them when a model asks for one."""
