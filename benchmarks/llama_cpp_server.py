"""llama.cpp's own server, as the package xllamacpp brings it, with a base model and LoRAs; for a Python that has it.

    python llama_cpp_server.py BASE.gguf LORA.gguf ...      prints its address, serves until its input ends

One request at a time on one thread, keys and values of attention in fp32. LoRAs as ``serve.sh`` of an export loads them.
"""

import sys

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in sys.argv[2:]]
params.lora_init_without_apply = True
params.n_ctx, params.n_parallel = 1024, 1
params.fit_params = params.warmup = False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
