# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the layers: a line each, and what must notice it."""

from __future__ import annotations

import os

from broken_copies import Mutant

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
    ("siblings", "layers/test_siblings.py::test_any_order"): [
        (
            "siblings are handed out for another tensor",
            "_held.x is x and _held.group is group and",
            "_held.group is group and",
        ),
        ("siblings are handed out after x was written to", "*how, x._version,", "*how, 0,"),
        (
            "siblings are handed out after a backward has freed them",
            '        if node is not None and not hasattr(node, "_raw_saved_tensors"):  # reshaped',
            "        if False:",
        ),
        (
            "siblings are looked at as if no output were a view",
            'hasattr(node.next_functions[0][0], "_raw_saved_tensors")',
            "pass",
        ),
        (
            "siblings made under autocast are handed out outside of it",
            "x.requires_grad, dtype, stream",
            "x.requires_grad, None, stream",
        ),
        (
            "siblings are handed out after a parameter was written to",
            "t._base), t._version, t.requires_grad, t.data_ptr()",
            "t._base), 0, t.requires_grad, t.data_ptr()",
        ),
        (
            "siblings cross into a checkpoint",
            "how = torch.is_grad_enabled(), hooks,",
            "how = torch.is_grad_enabled(), None,",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_the_first_of_a_group_begins_anew"): [
        (
            "siblings of an earlier forward are handed out after the first was called again",
            "and id(member) in _held.seats:\n        return _fetched(member)",
            ":\n        return _fetched(member) if id(member) in _held.seats else None",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_what_was_switched_in_between"): [
        (
            "siblings made in inference mode are handed out outside of it",
            "torch.is_inference_mode_enabled(), torch",
            "False, torch",
        ),
        (
            "siblings made under a dispatch mode are handed out outside of it",
            "torch._C._len_torch_dispatch_stack()",
            "0",
        ),
        (
            "siblings without gradients are handed out when they are asked for",
            "how = torch.is_grad_enabled(), hooks,",
            "how = True, hooks,",
        ),
    ],
    ("gated", "layers/test_siblings.py::test_compiled_and_transformed"): [
        (
            "siblings made under a transform are handed out outside of it",
            " or op.transformed() or",
            " or",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_keywords"): [
        (
            "frozen siblings have their own name for their input",
            "    def forward(self, input: Tensor) -> Tensor:",
            "    def forward(self, x: Tensor) -> Tensor:\n        input = x",
        ),
    ],
    ("lora", "layers/test_siblings.py::test_keywords"): [
        (
            "the layer has its own name for its input",
            "    def forward(self, input: Tensor) -> Tensor:",
            "    def forward(self, x: Tensor) -> Tensor:\n        input = x",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_copies_are_siblings_of_their_own"): [
        (
            "siblings are copied with their parent or not at all",
            "group.parent = type(None) if parent is None else weakref.ref(parent)",
            "group.parent = weakref.ref(parent)",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_another_stream"): [
        ("siblings are handed out on another stream", "dtype, stream, *modes", "dtype, *modes"),
    ],
    ("siblings", "layers/test_siblings.py::test_the_same_outputs_gradients_and_dropout"): [
        (
            "siblings are handed out twice",
            "_held.seats.pop(id(member))",
            "_held.seats.get(id(member))",
        ),
    ],
    ("gated", "layers/test_siblings.py::test_hooks_on_a_member"): [
        (
            "siblings are computed under hooks that may change x",
            "hooks = member._forward_pre_hooks or member._backward_hooks",
            "hooks = member._backward_hooks",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_many_threads"): [
        ("threads share what is held", "class _Held(threading.local):", "class _Held:"),
    ],
    (
        "siblings",
        "layers/test_siblings.py::test_a_group_that_misses_is_given_up_and_says_so_once",
    ): [
        (
            "siblings that are not called are computed for ever",
            '            vars(member).pop("_siblings", None)',
            "            pass",
        ),
        (
            "one miss in a hundred parts siblings",
            "_held.group.misses = max(0, _held.group.misses - 1)",
            "pass",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_a_group_that_misses_in_checkpoints_goes_on"): [
        (
            "siblings part between a forward and its checkpoint",
            "_held.circumstances[:3] == (True, None, -1)",
            "True",
        ),
        (
            "siblings part within a reentrant checkpoint's backward",
            "_held.circumstances[:3] == (True, None, -1)",
            "_held.circumstances[:2] == (True, None)",
        ),
    ],
    (
        "gated",
        "layers/test_siblings.py::test_inference_mode_few_tokens_and_what_a_layer_would_refuse",
    ): [
        ("a few tokens go the way of many", " and not plans.is_few(x.numel(), x.device)", ""),
    ],
    ("siblings", "layers/test_sibling_search.py::test_an_input_is_made_by_what_a_model_says"): [
        ("images have one channel", 'said("num_channels", "in_channels", default=3)', "1"),
        (
            "spectrograms lie one way round",
            "[(bands, 128), (128, bands), (bands, whole)]",
            "[(bands, 128), (bands, whole)]",
        ),
    ],
    ("siblings", "layers/test_sibling_search.py::test_an_error_names_only_what_the_model_has"): [
        (
            "an error names what the model does not have",
            "names = [tuple(several[:3]) for several in alike.values() if len(several) > 1][:1]",
            "names = [('q', 'k')]",
        ),
    ],
    ("siblings", "layers/test_gated_modules.py::test_the_report_says_why_not"): [
        (
            "a report does not say why a module is no gated MLP",
            "            report.lookalikes.append((kind.__name__, why_not))",
            "            pass",
        ),
    ],
    ("gated", "layers/test_gated.py::test_acceptance_rule"): [
        (
            "the gated MLP forgets up",
            "return act(g, **how).mul_(u)",
            "return act(g, **how)",
        ),
        (
            "the gated MLP's gradient of up is that of gate's input",
            "du = act(g, **how).mul_(dh)",
            "du = g * dh",
        ),
    ],
    ("../operator/eager", "layers/test_gated.py::test_first_and_second_derivatives"): [
        (
            "a gated MLP counts what its input depends on twice when gradients are differentiated",
            "[t if t is None else t.view_as(t) for t in inputs]",
            "list(inputs)",
        ),
    ],
    ("gated", "layers/test_gated_modules.py::test_what_only_looks_like_one"): [
        (
            "a gated MLP may do what nobody can follow",
            'next((what for what in done if not _FOLLOWED.fullmatch(what)), "")',
            '""',
        ),
        (
            "a gated MLP may make something beside",
            'if formula.count("(") == sum(',
            "if any(",
        ),
        (
            "a gated MLP's product may be written into",
            "__imul__ = str.__str__, None, None, None",
            "_ = str.__str__, None, None, None",
        ),
    ],
    ("gated", "layers/test_gated_modules.py::test_what_a_forward_loads_is_looked_up_each_time"): [
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
    ],
    (
        "gated",
        (
            "layers/test_gated_modules.py::test_what_a_forward_loads_is_looked_up_each_time "
            "layers/test_gated_modules.py::test_what_only_looks_like_one"
        ),
    ): [
        (
            "a gated MLP's activation may be called otherwise",
            "type(module).__call__ is not _CALL or module",
            "module",
        ),
    ],
    ("gated", "layers/test_gated_modules.py::test_what_a_forward_does_not_load_is_free"): [
        (
            "a gated MLP's gelu is always the exact one",
            "if act is function and given.items() <= how.items():",
            "if act is function:",
        ),
    ],
    ("gated", "layers/test_gated.py::test_first_and_second_derivatives"): [
        (
            "second derivatives of a gated MLP are those of no product",
            "[dh * u], g, (), [True])",
            "[dh * u.detach()], g, (), [True])",
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
