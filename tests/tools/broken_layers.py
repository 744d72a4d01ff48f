# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the layers: a line each, and what must notice it."""

from __future__ import annotations

import os

from broken_copies import Mutant

SIBLINGS, SEARCH, GATED, MODULES = (
    f"layers/test_{name}.py::test_"
    for name in ("siblings", "sibling_search", "gated", "gated_modules")
)

INPUT = (
    "forward(self, input: Tensor) -> Tensor:",
    "forward(self, x: Tensor) -> Tensor:\n        input = x",
)

# By file and the tests that must notice: what, right, wrong.
COPIES = {
    ("lora", "layers/test_layer.py::test_dropout_is_a_child_and_read_at_each_call"): [
        ("something is dropped in evaluation", "dropout.p if dropout.training and", "dropout.p if"),
    ],
    (
        "active",
        (
            "layers/test_active.py::test_dropped_inputs_are_not_kept_but_drawn_again "
            "layers/test_active.py::test_each_drops_its_own_elements"
        ),
    ): [
        (
            "a second adapter drops what the first does",
            "        seed = new_seed(x.device) if p else None",
            "        seed = torch.ones(1, dtype=torch.int64, device=x.device) if p else None",
        ),
    ],
    ("active", "layers/test_active.py::test_dropped_inputs_are_not_kept_but_drawn_again"): [
        (
            "several adapters keep what they have dropped",
            "        if transformed():",
            "        if True:",
        ),
    ],
    ("lora", "layers/test_layer.py::test_scaling"): [
        ("alpha / r with rsLoRA", "(math.sqrt(r) if use_rslora else r)", "r"),
    ],
    ("lora", "layers/test_layer.py::test_starts_as_its_base_and_trains_only_the_adapter"): [
        (
            "the base weight trains",
            "        self.weight.requires_grad_(False)\n        if self.bias",
            "        if self.bias",
        ),
    ],
    ("lora", "layers/test_layer.py::test_unmerge_restores_every_bit"): [
        ("unmerging subtracts", ".copy_(self.base_weight)\n", ".sub_(self.delta_weight())\n"),
        (
            "a merged layer adds its adapter again",
            (
                "        if self.merged:\n"
                "            return F.linear(input, self._oriented(), self.bias)\n"
                "        ((a, b, scaling, p),) = self.adapters()"
            ),
            "        a, b, scaling, p = self.lora_A, self.lora_B, self.scaling, 0.0",
        ),
    ],
    ("lora", "layers/test_layer.py::test_merging_writes_into_the_weight_s_own_memory"): [
        (
            "merging makes another weight",
            "        weight.copy_(merged)",
            "        self.weight = nn.Parameter(merged, requires_grad=False)",
        ),
    ],
    (
        "lora",
        ("layers/test_layer.py::test_two_layers_of_one_weight_do_not_merge_into_each_other"),
    ): [
        (
            "layers of one weight merge into each other",
            "        return same and other.merged",
            "        return False and other.merged",
        ),
        (
            "copies of merged layers are not known as such",
            "        super().__setstate__(state)\n        if self.merged:",
            "        super().__setstate__(state)\n        if False:",
        ),
    ],
    ("lora", "layers/test_layer.py::test_sharded"): [
        (
            "what is sharded is merged",
            "        elif type(weight.data) is not Tensor:",
            "        elif False:",
        ),
    ],
    ("lora", "layers/test_replace.py::test_offloaded"): [
        (
            "a merged layer adds its adapter again among its siblings",
            "        if self.merged:\n            return []",
            "        if False:\n            return []",
        ),
    ],
    ("lora", ("layers/test_layer.py::test_safe_merge_refuses_infinities_and_changes_nothing")): [
        (
            "a safe merge takes what is not finite",
            "        if safe and not torch.isfinite(merged).all():",
            "        if False:",
        ),
    ],
    ("lora", "layers/test_layer.py::test_no_state_has_the_adapter_twice"): [
        (
            "a state saved while merged is loaded as if it were not",
            "        if saved_merged:\n            self.base_weight",
            (
                "        state_dict.pop(f'{prefix}base_weight', None)\n"
                "        if False:\n"
                "            self.base_weight"
            ),
        ),
        (
            "a merged layer stays merged when a state is loaded",
            "            self.unmerge()\n        if saved",
            "            pass\n        if saved",
        ),
    ],
    ("lora", "layers/test_layer.py::test_a_base_checkpoint_loads_unchanged"): [
        (
            "a base checkpoint has to hold adapters",
            "        if own.keys().isdisjoint(state_dict):",
            "        if False:",
        ),
    ],
    ("lora", "layers/test_layer.py::test_meta_device"): [
        (
            "what is drawn again stays merged",
            "            self.base_weight = None\n            self._draw",
            "            self._draw",
        ),
    ],
    ("lora", "layers/test_layer.py::test_what_cannot_become_a_lora_layer"): [
        (
            "a layer that is compiled by itself is copied",
            "    if module._compiled_call_impl is not None:",
            "    if False:",
        ),
    ],
    ("replace", "layers/test_replace.py::test_what_cannot_be_is_refused_and_nothing_changed"): [
        (
            "what was wrapped by compile alone is replaced inside",
            "        if id(module) in compiled:",
            "        if False:",
        ),
        (
            "a model that is spread by DDP gets adapters that nobody synchronises",
            "        if spread := kinds & _SPREAD:",
            "        if spread := None:",
        ),
    ],
    ("replace", ("layers/test_replace.py::test_the_same_layers_as_in_peft_and_the_same_numbers")): [
        (
            "the rest of the model trains",
            "        if id(parameter) not in adapters:",
            "        if False:",
        ),
    ],
    ("replace", "layers/test_replace.py::test_what_was_replaced_before_stays"): [
        (
            "adapters that were there are frozen",
            "        if id(parameter) not in adapters:",
            "        if True:",
        ),
    ],
    ("replace", "layers/test_replace.py::test_a_failure_half_way_changes_nothing"): [
        (
            "a replacement that fails leaves layers frozen",
            "            parameter.requires_grad_(value)\n",
            "            pass\n",
        ),
    ],
    ("replace", "layers/test_replace.py::test_a_module_under_two_names_is_replaced_once"): [
        (
            "a shared layer is replaced under one of its names",
            "                parent._modules[name] = new[id(child)]",
            "                parent._modules[name] = new.pop(id(child))",
        ),
        (
            "an adapter is saved under each of its names",
            "            own.remove(id(tensor))  # once, whatever its names\n",
            "",
        ),
    ],
    ("replace", "layers/test_replace.py::test_names_that_are_no_module_s_are_reported"): [
        (
            "names select by their end, wherever it begins",
            "[not each.isdisjoint(names) for each in ends]",
            "[name.endswith(tuple(names)) for name, _ in named]",
        ),
    ],
    ("replace", ("layers/test_replace.py::test_pytorch_s_fast_path_does_not_pass_an_adapter_by")): [
        (
            "PyTorch's encoder reads weights past the adapters",
            "            module.activation_relu_or_gelu = 0  # the layer's switch\n",
            "            pass\n",
        ),
    ],
    ("siblings", f"{SIBLINGS}any_order"): [
        ("siblings of another tensor are handed out", "_held.x is x and ", ""),
        ("siblings are handed out after x was written to", "*how, x._version,", "*how, 0,"),
        (
            "siblings are handed out after a backward has freed them",
            'if node is not None and not hasattr(node, "_raw_saved_tensors"):  # reshaped',
            "if False:",
        ),
        (
            "siblings are looked at as if no output were a view",
            'hasattr(node.next_functions[0][0], "_raw_saved_tensors")',
            "pass",
        ),
        ("siblings of autocast are handed out outside", "dtype, stream", "None, stream"),
        ("siblings are handed out after a weight was written to", "t._version,", "0,"),
        ("siblings cross into a checkpoint", "_enabled(), hooks,", "_enabled(), None,"),
    ],
    ("siblings", f"{SIBLINGS}the_first_of_a_group_begins_anew"): [
        (
            "siblings of an earlier forward are handed out after the first was called again",
            "and id(member) in _held.seats:\n        return _fetched(member)",
            ":\n        return _fetched(member) if id(member) in _held.seats else None",
        ),
    ],
    ("siblings", f"{SIBLINGS}what_was_switched_in_between"): [
        ("siblings leave inference mode", "torch.is_inference_mode_enabled(), ", ""),
        ("siblings leave a dispatch mode", "torch._C._len_torch_dispatch_stack()", "0"),
        ("siblings come without gradients", "how = torch.is_grad_enabled(),", "how = True,"),
    ],
    ("gated", f"{SIBLINGS}compiled_and_transformed"): [
        ("siblings leave a transform", " or op.transformed() or", " or"),
    ],
    ("gated", f"{SIBLINGS}hooks_on_a_member"): [
        (
            "siblings are computed under hooks that may change x",
            "member._forward_pre_hooks or ",
            "",
        ),
    ],
    ("gated", f"{SIBLINGS}inference_mode_few_tokens_and_what_a_layer_would_refuse"): [
        ("a few tokens go the way of many", " and not plans.is_few(x.numel(), x.device)", ""),
    ],
    ("siblings", f"{SIBLINGS}keywords"): [("frozen siblings name their input", *INPUT)],
    ("lora", f"{SIBLINGS}keywords"): [("the layer has its own name for its input", *INPUT)],
    ("siblings", f"{SIBLINGS}copies_are_siblings_of_their_own"): [
        ("siblings are copied with their parent or not at all", "if parent is None else", "and"),
    ],
    ("siblings", f"{SIBLINGS}another_stream"): [
        ("siblings are handed out on another stream", "dtype, stream, *modes", "dtype, *modes"),
    ],
    ("siblings", f"{SIBLINGS}the_same_outputs_gradients_and_dropout"): [
        ("siblings are handed out twice", "seats.pop(id(member))", "seats.get(id(member))"),
    ],
    ("siblings", f"{SIBLINGS}many_threads"): [
        ("threads share what is held", "class _Held(threading.local):", "class _Held:"),
    ],
    ("siblings", f"{SIBLINGS}a_group_that_misses_is_given_up_and_says_so_once"): [
        (
            "siblings part in vain",
            '            vars(member).pop("_siblings", None)',
            "            pass",
        ),
        ("one miss in a hundred parts siblings", "max(0, _held.group.misses - 1)", "8"),
    ],
    ("siblings", f"{SIBLINGS}a_group_that_misses_in_checkpoints_goes_on"): [
        ("siblings part before a checkpoint's backward", "[:3] == (True, None, -1)", ""),
        ("siblings part within one", "[:3] == (True, None, -1)", "[:2] == (True, None)"),
    ],
    ("siblings", f"{SEARCH}an_input_is_made_by_what_a_model_says"): [
        ("images have one channel", 'said("num_channels", "in_channels", default=3)', "1"),
        ("spectrograms lie one way round", "(128, bands), (bands, whole)", "(bands, whole)"),
    ],
    ("siblings", f"{SEARCH}an_error_names_only_what_the_model_has"): [
        (
            "an error names what the model does not have",
            "[tuple(several[:3]) for",
            "[('q', 'k') for",
        ),
    ],
    ("siblings", f"{MODULES}the_report_says_why_not"): [
        ("no report says why a module is no gated MLP", "lookalikes.append(", "lookalikes.count("),
    ],
    ("gated", f"{GATED}acceptance_rule"): [
        ("the gated MLP forgets up", "return act(g, **how).mul_(u)", "return act(g, **how)"),
        ("up's gradient is that of gate's input", "du = act(g, **how).mul_(dh)", "du = g * dh"),
    ],
    ("gated", f"{GATED}first_and_second_derivatives"): [
        ("a gated MLP's second derivatives forget up", "[dh * u], g,", "[dh * u.detach()], g,"),
    ],
    ("../operator/eager", f"{GATED}first_and_second_derivatives"): [
        (
            "a gated MLP counts what its input depends on twice when gradients are differentiated",
            "[t if t is None else t.view_as(t) for t in inputs]",
            "list(inputs)",
        ),
    ],
    ("gated", f"{MODULES}what_only_looks_like_one"): [
        ("a gated MLP may do what nobody can follow", "not _FOLLOWED.fullmatch(what)", "not what"),
        ("a gated MLP may make something beside", 'if formula.count("(") == sum(', "if any("),
        ("a gated MLP's product may be written into", "__mod__, __imul__ =", "__mod__, _ ="),
    ],
    ("gated", f"{MODULES}what_a_forward_loads_is_looked_up_each_time"): [
        (
            "a gated MLP's forward is read once",
            "names, activation = read(module) if",
            'names, activation = vars(module).setdefault("_read", read(module)) if',
        ),
        (
            "a gated MLP's layers are its children, whatever hides them",
            "[getattr(module, name, None) for name in names]",
            "[module._modules[name] for name in names]",
        ),
        (
            "a gated MLP's layers may do more than theirs",
            'return "sibling_operands" in own and',
            'return hasattr(type(module), "sibling_operands") and',
        ),
        ("an activation may be called otherwise", "type(module).__call__ is not _CALL or ", ""),
    ],
    ("gated", f"{MODULES}what_a_forward_does_not_load_is_free"): [
        (
            "every gelu is the exact one",
            "act is function and given.items() <= how.items()",
            "act is function",
        ),
    ],
    ("active", "operator/test_batched_gradients.py::test_per_sample_gradients"): [
        (
            "several adapters that drop know no transforms",
            "        if transformed():",
            "        if False:",
        ),
    ],
}
MUTANTS = [
    Mutant(what, os.path.normpath(f"fastlora/layers/{file}.py"), right, wrong, tests)
    for (file, tests), copies in COPIES.items()
    for what, right, wrong in copies
]
