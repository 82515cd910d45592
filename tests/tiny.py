"""Tiny random checkpoints of every architecture, as save_pretrained writes them, and a text for prompts.

Weights are random but not degenerate: activations are of order 1, every bias and norm differs from its default,
logits have a clear maximum, greedy tokens vary, and no special token is ever the most likely one.
"""

from pathlib import Path
from typing import Any

import torch
from tiny_types import BOS_ID, COMMON, CONTEXT, EOS_ID, PAD_ID, TINY, UNSUPPORTED, VOCAB  # noqa: F401
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

BOS, EOS, PAD, START = "<s>", "<|end|>", "<pad>", "<|start|>"
SPECIALS = [PAD, BOS, EOS, START]  # ids 0, 1, 2, 3
START_ID = SPECIALS.index(START)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def tiny_checkpoint(
    folder: Path,
    name: str,
    *,
    tied: bool | None = None,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    chat: bool = False,
    **overrides: Any,
) -> Path:
    """Write a random model, `name` a key of TINY or UNSUPPORTED, with its tokenizer; return `folder`.

    tied None keeps what TINY says; `overrides` go to the config. More than one shard comes with an index;
    their number is exact or a ValueError."""
    kwargs = {"model_type": name, **(TINY | UNSUPPORTED)[name], **overrides}
    if tied is not None:
        kwargs["tie_word_embeddings"] = tied
    config = AutoConfig.for_model(**kwargs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomise(model)
    model.generation_config = GenerationConfig(pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID)
    model.to(dtype)
    model.config.dtype = dtype
    folder.mkdir(parents=True, exist_ok=True)
    _save(model, folder, shards)
    tiny_tokenizer(chat=chat).save_pretrained(folder)
    return folder


def tiny_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with exactly VOCAB entries, so every text round-trips and every id decodes.

    Puts <s> before a text, as Llama's and Gemma's do; the chat template writes its own <s>, as theirs do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "Ġetaoins" for b in "etaoinsrh"][: VOCAB - len(SPECIALS) - len(alphabet)]
    words = [*SPECIALS, *alphabet, *(a + b for a, b in pairs)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(special, normalized=False, special=True) for special in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=PAD,  # Qwen2Tokenizer, which transformers puts in its place, would add one of its own
        extra_special_tokens=[START],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def tiny_prompt(tokens: int = 48, seed: int = 0) -> list[int]:
    """<s> and random ordinary tokens: `tokens` ids in all."""
    ids = torch.randint(len(SPECIALS), VOCAB, (tokens - 1,), generator=torch.Generator().manual_seed(seed))
    return [BOS_ID, *ids.tolist()]


# Parameters and buffers: where attention looks at; what is added to a router's scores, what scales a layer of Gemma 4.
_SHARP = ("embed_positions.weight", "wpe.weight", "q_norm.weight", "k_norm.weight")
_SMALL = ("correction_bias", "expert_bias", "layer_scalar")


@torch.no_grad()
def randomise(model: PreTrainedModel, text: PreTrainedModel | None = None) -> None:
    """`text`: the part of the model that writes text, where it is a part."""
    text = text or model
    embedding, head = text.get_input_embeddings(), text.get_output_embeddings()
    for name, parameter in model.named_parameters():
        if parameter is embedding.weight:
            # Gemma multiplies embeddings by a scale of its own: share it between the input and the tied head.
            parameter.normal_(std=0.5 * float(getattr(embedding, "embed_scale", 1.0)) ** -0.5)
        elif name.endswith(_SHARP):
            parameter.normal_(std=2)  # attention that looks somewhere: an average of all tokens repeats one word
        elif name.endswith(_SMALL):
            parameter.normal_(mean=parameter.mean().item(), std=0.1)  # more would leave experts without a token
        elif parameter.ndim > 1:
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        elif name.endswith("weight"):  # a norm's
            parameter.normal_(std=1)  # of both signs: with a tied head, ones would repeat the last token
        else:
            parameter.normal_(std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith(_SMALL):
            buffer.normal_(mean=buffer.mean().item(), std=0.1)
    head.weight[: len(SPECIALS)] *= 0.05
    if embedding.padding_idx is not None:
        embedding.weight[embedding.padding_idx] = 0  # from_pretrained puts zeros there for some types


def _save(model: PreTrainedModel, folder: Path, shards: int) -> None:
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    for size in range(total // shards, 2 * total, max(1, total // 50)):
        model.save_pretrained(folder, max_shard_size=size)
        written = len(list(folder.glob("*.safetensors")))
        if written <= shards:
            break
    if written != shards:
        raise ValueError(f"{model.config.model_type} cannot be cut into {shards} shards (got {written})")


def text_paragraph(words: int | None = None) -> str:
    """The opening of Alice's Adventures in Wonderland (Lewis Carroll, 1865; public domain), or its first words."""
    return " ".join(_ALICE.split()[:words])


_ALICE = """
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice
she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and what is the
use of a book," thought Alice "without pictures or conversations?" So she was considering in her own mind (as well as
she could, for the hot day made her feel very sleepy and stupid), whether the pleasure of making a daisy-chain would be
worth the trouble of getting up and picking the daisies, when suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the Rabbit say
to itself, "Oh dear! Oh dear! I shall be late!" (when she thought it over afterwards, it occurred to her that she ought
to have wondered at this, but at the time it all seemed quite natural); but when the Rabbit actually took a watch out
of its waistcoat-pocket, and looked at it, and then hurried on, Alice started to her feet, for it flashed across her
mind that she had never before seen a rabbit with either a waistcoat-pocket, or a watch to take out of it, and burning
with curiosity, she ran across the field after it, and fortunately was just in time to see it pop down a large
rabbit-hole under the hedge.

In another moment down went Alice after it, never once considering how in the world she was to get out again. The
rabbit-hole went straight on like a tunnel for some way, and then dipped suddenly down, so suddenly that Alice had not
a moment to think about stopping herself before she found herself falling down a very deep well.

Either the well was very deep, or she fell very slowly, for she had plenty of time as she went down to look about her
and to wonder what was going to happen next. First, she tried to look down and make out what she was coming to, but it
was too dark to see anything; then she looked at the sides of the well, and noticed that they were filled with
cupboards and book-shelves; here and there she saw maps and pictures hung upon pegs. She took down a jar from one of the
shelves as she passed; it was labelled "ORANGE MARMALADE", but to her great disappointment it was empty: she did not
like to drop the jar for fear of killing somebody underneath, so managed to put it into one of the cupboards as she fell
past it.

"Well!" thought Alice to herself, "after such a fall as this, I shall think nothing of tumbling down stairs! How brave
they'll all think me at home! Why, I wouldn't say anything about it, even if I fell off the top of the house!" (Which
was very likely true.)

Down, down, down. Would the fall never come to an end? "I wonder how many miles I've fallen by this time?" she said
aloud. "I must be getting somewhere near the centre of the earth. Let me see: that would be four thousand miles down, I
think" (for, you see, Alice had learnt several things of this sort in her lessons in the schoolroom, and though this was
not a very good opportunity for showing off her knowledge, as there was no one to listen to her, still it was good
practice to say it over) "yes, that's about the right distance, but then I wonder what Latitude or Longitude I've got
to?" (Alice had no idea what Latitude was, or Longitude either, but thought they were nice grand words to say.)
"""
