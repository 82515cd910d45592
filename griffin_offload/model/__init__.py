"""transformers' model without weights, and what runs inside it.

architecture.py    the table of supported model types
refused.py         model types that are refused, with the reason
wrappers.py            which multimodal wrappers are opened, which are refused
multimodal.py      the text model inside a multimodal checkpoint
detect.py          finds the blocks of a type that is in no table
layout.py          a model's layers, blocks and shapes, as data
skeleton.py        builds the model on meta and binds it to a checkpoint
weight_slots.py    puts weights into the modules, and takes them out
attention_sizes.py  sizes of keys and queries, from the modules
compute_dtype.py       the dtype that a model computes in
config_facts.py    sizes that a config tells
config_allowed.py      which fields of config.json reach transformers
config_bounds.py   bounds of its numbers, checked before anything is made of them
config_fields.py   fields of a config that act against our own cache and attention
generation_allowed.py  what of a generation config reaches transformers: known fields, each of its kind
generation_fields.py  a folder's generation config: what acts, what is overridden, what is refused
pretrained.py      a folder's config and headers, checked
tokenizer.py       a folder's tokenizer, checked
channels.py        what special tokens say of an answer's text: thinking, and the reply
long_texts.py      token ids of texts longer than a model reads
chat_template.py   a tokenizer's chat template: which one, and the form of messages that it reads
template_sandbox.py  bounds of the time and memory that a template takes
modules.py         forwards that replace a module's own
hooks.py           observers of a layer
hops.py            layers on several devices: the states move from one to the next
attention.py       attention of long prompts in chunks, and of one token
rotary.py          rotary embeddings that change with the length, row by row
kv_cache.py        the KV cache, allocated once
cache_layers.py    its layers: memory for all tokens
recurrent.py       recurrent states in the cache, and copies of them
read_again.py      the KV cache as it was before a prompt's last tokens
static_cache.py    the KV cache at fixed addresses
static_step.py     decodes a token by work that a CUDA graph can record
compiled.py        compiles the decoder layers
decode_kernels.py  torch's own kernels while one token is decoded
norms.py           RMS norms of one or two operators
rotary_kernel.py   the rotation of one token on a GPU by one kernel
triton_rotary.py   the kernel, in Triton
threads.py         as many threads as other programs leave cores
bandwidth.py       how fast the resident weights are read
format_speeds.py   how fast each format of weights is multiplied on this device
"""
