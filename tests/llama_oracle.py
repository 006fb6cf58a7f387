"""A LLaMA written out in float64, in which pruned image tokens are hidden from later layers and never deleted.

Shapes: L rows, H heads, E head width, V vocabulary.
"""

import torch

WIDTH = 64


def tiny_model(model_type: str = "llama", *, layers: int = 4, seed: int = 0, **settings):
    """A random model of transformers whose weights are large enough for its attention to be peaked."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 97, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = AutoConfig.for_model(model_type, **sizes, **heads, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # every answer runs to its full length
    for weight in model.parameters():
        weight.mul_(5 if weight.ndim > 1 else 1)
    return model


def forward(model, rows, rule=None, *, renumber=False):
    """Logits [L, V] and the set of deleted rows after each layer, for one prompt [L, D].

    `rule(layer, attention, next_attention)` names the rows to hide after `layer` (-1: before the first), seeing that
    layer's attention [H, L, L] (None at -1) and a function that gives the next one's. With `renumber`, a row's position
    in a layer is the number of rows before it that are not hidden there.
    """
    config, weights = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    length, heads, width = len(rows), config.num_attention_heads, config.head_dim
    frequency = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2).double() / width)
    deleted: list[set[int]] = [set()]

    def linear(x, layer, name):
        return x @ weights[f"model.layers.{layer}.{name}.weight"].T

    def norm(x, name):
        return weights[f"model.{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def split(x):  # heads first; grouped keys and values repeated
        x = x.unflatten(-1, (-1, width)).transpose(0, 1)
        return x.repeat_interleave(heads // len(x), dim=0)

    def rotate(x):
        position = torch.arange(length)
        if renumber:
            position = position - torch.tensor([sum(gone < i for gone in deleted[-1]) for i in range(length)])
        angle = torch.outer(position.double(), frequency).repeat(1, 2)
        left, right = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat([-right, left], dim=-1) * angle.sin()

    def attention(x, layer):
        x = norm(x, f"layers.{layer}.input_layernorm")
        query, key = (rotate(split(linear(x, layer, f"self_attn.{name}_proj"))) for name in "qk")
        hidden_from = torch.zeros(length, dtype=torch.bool)
        hidden_from[list(deleted[-1])] = True
        visible = torch.ones(length, length).tril().bool() & (~hidden_from | torch.eye(length).bool())
        return (query @ key.mT / width**0.5).masked_fill(~visible, -torch.inf).softmax(-1)

    def apply_rule(layer, seen, x):
        new = set() if rule is None else rule(layer, seen, lambda: attention(x, layer + 1))
        deleted.append(deleted[-1] | new)

    x = rows.double()
    apply_rule(-1, None, x)
    for layer in range(config.num_hidden_layers):
        seen = attention(x, layer)
        value = split(linear(norm(x, f"layers.{layer}.input_layernorm"), layer, "self_attn.v_proj"))
        x_out = x + linear((seen @ value).transpose(0, 1).flatten(1), layer, "self_attn.o_proj")
        y = norm(x_out, f"layers.{layer}.post_attention_layernorm")
        gate = torch.nn.functional.silu(linear(y, layer, "mlp.gate_proj"))
        x = x_out + linear(gate * linear(y, layer, "mlp.up_proj"), layer, "mlp.down_proj")
        apply_rule(layer, seen, x)
    return norm(x, "norm") @ weights["lm_head.weight"].T, deleted[1:]


def lowest(score: dict[int, float], number: int) -> set[int]:
    """The `number` keys with the smallest score; among equals, the later ones."""
    return set(sorted(score, key=lambda i: (score[i], -i))[:number])


def fastv_rule(image: range, last: int, *, layer: int, kept: int):
    def rule(after, seen, _):
        if after != layer - 1:
            return set()
        return lowest({i: float(seen[:, last, i].mean()) for i in image}, len(image) - kept)

    return rule


def vtw_rule(image: range, last: int, *, layer: int):
    return lambda after, seen, _: set(image) if after == layer - 1 else set()


def pyramiddrop_rule(image: range, last: int, *, stages: dict[int, int]):
    left = set(image)

    def rule(after, _, next_attention):
        if after + 1 not in stages:
            return set()
        seen = next_attention()
        gone = lowest({i: float(seen[:, last, i].mean()) for i in left}, len(left) - stages[after + 1])
        left.difference_update(gone)
        return gone

    return rule


def fitprune_rule(image: range, last: int, *, recipe: dict[int, int]):
    left = set(image)

    def rule(after, seen, _):
        if after not in recipe:
            return set()
        largest = seen.amax(dim=0)
        text = range(image.stop, last + 1)
        score = {}
        for i in left:
            own = sum(float(largest[j, i]) for j in left) / len(left)
            score[i] = own * sum(float(largest[t, i]) for t in text)
        gone = lowest(score, recipe[after])
        left.difference_update(gone)
        return gone

    return rule
