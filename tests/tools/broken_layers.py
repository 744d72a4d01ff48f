# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the layers: a line each, and what must notice it."""

from __future__ import annotations

import os

from broken_copies import Mutant

LAYER, REPLACE = "layers/test_layer.py::test_", "layers/test_replace.py::test_"
DRAWN_AGAIN = "layers/test_active.py::test_dropped_inputs_are_not_kept_but_drawn_again"
OTHER_MASK = "layers/test_active.py::test_each_drops_its_own_elements"
NOT_TWICE = f"{LAYER}no_state_has_the_adapter_twice"
ALONE = f"{LAYER}two_layers_of_one_weight_do_not_merge_into_each_other"
NO_BASE = "self.base_weight = torch.empty_like("
SWITCHES = "parent.activation_relu_or_gelu, parent.use_nested_tensor"
FREEZE, CHILD = "requires_grad_(id(parameter) in adapters)", "new.get(id(child), child)"
FORWARD = "    def forward(self, input: Tensor) -> Tensor:"
RENAMED = "    def forward(self, x: Tensor) -> Tensor:\n        input = x"

# By file and the tests that must notice: what, right, wrong.
COPIES = {
    ("lora", f"{LAYER}dropout_is_a_child_and_read_at_each_call"): [
        ("something is dropped in evaluation", "dropout.p if dropout.training and", "dropout.p if"),
    ],
    ("lora", f"{LAYER}scaling"): [
        ("alpha / r with rsLoRA", "(math.sqrt(r) if use_rslora else r)", "r"),
    ],
    ("lora", f"{LAYER}starts_as_its_base_and_trains_only_the_adapter"): [
        ("the base weight trains", "self.weight.requires_grad_(False)", "pass"),
    ],
    ("lora", f"{LAYER}unmerge_restores_every_bit"): [
        ("unmerging subtracts", ".copy_(self.base_weight)\n", ".sub_(self.delta_weight())\n"),
        ("merging makes another weight", "weight.copy_(merged)", "self.weight.data = merged"),
        ("a merged layer adds its adapter again", "if self.merged:\n            return None", ""),
    ],
    ("lora", ALONE): [
        ("layers of one weight merge into each other", "if layer is not self and", "if 0 and"),
        ("merged layers' copies are not known", "(state)\n        _layers.add(self)", "(state)"),
    ],
    ("lora", f"{LAYER}sharded"): [
        ("what is sharded is merged", "elif type(weight.data) is not Tensor:", "elif False:"),
    ],
    ("lora", f"{LAYER}safe_merge_refuses_infinities_and_changes_nothing"): [
        ("a safe merge takes what is not finite", "if safe and not", "if False and not"),
    ],
    ("lora", NOT_TWICE): [
        ("a state saved while merged is loaded as another", NO_BASE, "_ = torch.empty_like("),
        (
            "a merged layer stays merged when a state is loaded",
            "elif self.merged and",
            "elif 0 and",
        ),
        ("the state that is loaded is written to", NO_BASE, f"self.unmerge(); {NO_BASE}"),
    ],
    ("lora", f"{LAYER}a_base_checkpoint_loads_unchanged"): [
        ("a base checkpoint has to hold adapters", "if adapter.keys().isdisjoint", "if 0 and"),
    ],
    ("lora", f"{LAYER}meta_device"): [
        ("what is drawn again stays merged", "self.base_weight = None\n            self", "self"),
    ],
    ("lora", f"{LAYER}what_cannot_become_a_lora_layer"): [
        ("a compiled layer is copied", "module._compiled_call_impl is not None", "False"),
    ],
    ("replace", f"{REPLACE}what_cannot_be_is_refused_and_nothing_changed"): [
        ("what compile has wrapped is replaced inside", 'not in ("", "_orig_mod")', '!= ""'),
        ("what DDP has spread gets adapters", '"DistributedDataParallel": "', '"": "'),
    ],
    ("replace", f"{REPLACE}what_was_replaced_before_stays"): [
        ("the rest of the model trains", FREEZE, "requires_grad_(True)"),
        ("adapters that were there are frozen", FREEZE, "requires_grad_(False)"),
    ],
    ("replace", f"{REPLACE}a_failure_half_way_changes_nothing"): [
        ("a failed replacement freezes layers", "parameter.requires_grad_(True)", "pass"),
    ],
    ("replace", f"{REPLACE}a_module_under_two_names_is_replaced_once"): [
        ("a shared layer is replaced once", CHILD, CHILD.replace("get", "pop")),
        ("adapters are saved under all their names", "adapters.pop(id(tensor), None)", "tensor"),
    ],
    ("replace", f"{REPLACE}names_that_are_no_module_s_are_reported"): [
        ("names may begin anywhere", 'f".{each[0]}".endswith(ends)', "each[0].endswith((*names,))"),
    ],
    ("replace", f"{REPLACE}pytorch_s_fast_path_does_not_pass_an_adapter_by"): [
        ("PyTorch's encoder reads weights past the adapters", SWITCHES, "_, _"),
    ],
    ("lora", "layers/test_siblings.py::test_keywords"): [
        ("the layer has its own name for its input", FORWARD, RENAMED),
    ],
    ("active", f"{DRAWN_AGAIN} {OTHER_MASK}"): [
        (
            "a second adapter drops what the first does",
            "new_seed(x.device)",
            "torch.ones(1).long()",
        ),
    ],
    ("active", DRAWN_AGAIN): [
        ("several adapters keep what they have dropped", "if transformed():", "if True:"),
    ],
    ("active", "operator/test_batched_gradients.py::test_per_sample_gradients"): [
        ("several adapters that drop know no transforms", "if transformed():", "if False:"),
    ],
    ("siblings", "layers/test_siblings.py::test_another_tensor_and_members_alone"): [
        (
            "siblings are handed out for another tensor",
            "held.group is group and held.x is x and",
            "held.group is group and",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_x_written_to_in_between"): [
        (
            "siblings are handed out after x was written to",
            "return *how, x._version, x.requires_grad,",
            "return *how, 0, x.requires_grad,",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_the_first_of_a_group_begins_anew"): [
        (
            "siblings of an earlier forward are handed out after the first was called again",
            "and held.x is x and id(member) in held.seats:\n        return _fetch(held, member, x)",
            (
                "and held.x is x:\n"
                "        return _fetch(held, member, x) if id(member) in held.seats else None"
            ),
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_outputs_whose_graph_is_gone"): [
        ("siblings are handed out after a backward has freed them", " and not _is_freed(y)", ""),
        (
            "siblings are looked at as if no output were a view",
            'hasattr(node.next_functions[0][0], "_raw_saved_tensors")',
            "pass",
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
    ("siblings", "layers/test_siblings.py::test_compiled_and_transformed"): [
        (
            "siblings made under a transform are handed out outside of it",
            "if torch._C._are_functorch_transforms_active():",
            "if False:",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_any_order"): [
        (
            "siblings made under autocast are handed out outside of it",
            "x.requires_grad, dtype, _stream",
            "x.requires_grad, None, _stream",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_keywords"): [
        (
            "frozen siblings have their own name for their input",
            "    def forward(self, input: Tensor) -> Tensor:",
            "    def forward(self, x: Tensor) -> Tensor:\n        input = x",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_a_copy_without_its_parent"): [
        (
            "siblings are copied with their parent or not at all",
            "group.parent = None if parent is None else weakref.ref(parent)",
            "group.parent = weakref.ref(parent)",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_another_stream"): [
        ("siblings are handed out on another stream", "dtype, _stream(x), *modes", "dtype, *modes"),
    ],
    ("siblings", "layers/test_siblings.py::test_changed_in_between"): [
        (
            "siblings are handed out after a parameter was written to",
            "t._base), t._version, t.requires_grad, t.data_ptr())",
            "t._base), 0, t.requires_grad, t.data_ptr())",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_the_same_outputs_gradients_and_dropout"): [
        (
            "siblings are handed out twice",
            "held.seats.pop(id(member))",
            "held.seats.get(id(member))",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_a_sibling_on_each_side_of_a_checkpoint"): [
        (
            "siblings cross into a checkpoint",
            "how = torch.is_grad_enabled(), hooks,",
            "how = torch.is_grad_enabled(), None,",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_hooks_on_a_member"): [
        (
            "siblings are computed under hooks that may change x",
            "        member._forward_pre_hooks\n        or member._backward_hooks",
            "        member._backward_hooks",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_many_threads"): [
        (
            "threads share what is held",
            "_slot = threading.local()",
            "_slot = type('Slot', (), {})()",
        ),
    ],
    (
        "siblings",
        ("layers/test_siblings.py::test_a_group_that_misses_is_given_up_and_says_so_once"),
    ): [
        (
            "siblings that are not called are computed for ever",
            '            vars(member).pop("_siblings", None)',
            "            pass",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_a_group_that_seldom_misses_stays"): [
        (
            "one miss in a hundred parts siblings",
            "held.group.misses = max(0, held.group.misses - 1)",
            "pass",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_a_group_that_misses_in_checkpoints_goes_on"): [
        (
            "siblings part between a forward and its checkpoint",
            "held.circumstances[:3] == (True, None, -1)",
            "True",
        ),
        (
            "siblings part within a reentrant checkpoint's backward",
            "held.circumstances[:3] == (True, None, -1)",
            "held.circumstances[:2] == (True, None)",
        ),
    ],
    ("siblings", "layers/test_siblings.py::test_few_tokens_run_as_plain_layers"): [
        (
            "a few tokens go the way of many",
            "    if plans.is_few(x.numel(), x.device):",
            "    if False:",
        ),
    ],
    ("examples", "layers/test_sibling_search.py::test_an_input_is_made_by_what_a_model_says"): [
        ("images have one channel", 'said("num_channels", "in_channels", default=3)', "1"),
        (
            "spectrograms lie one way round",
            "zeros((bands, FRAMES), (FRAMES, bands), (bands, whole))",
            "zeros((bands, FRAMES), (bands, whole))",
        ),
    ],
    (
        "sibling_search",
        "layers/test_sibling_search.py::test_an_error_names_only_what_the_model_has",
    ): [
        (
            "an error names what the model does not have",
            "tuple(names[:3]) for names in known.values() if len(names) > 1), None)",
            "('q', 'k') for names in known.values()), ('q', 'k'))",
        ),
    ],
    ("gated", "layers/test_gated.py::test_acceptance_rule"): [
        (
            "the gated MLP forgets up",
            "return ACTIVATIONS[activation][0](g).mul_(u)",
            "return ACTIVATIONS[activation][0](g)",
        ),
        (
            "the gated MLP's gradient of up is that of gate's input",
            "du = act(g).mul_(dh)",
            "du = g * dh",
        ),
    ],
    (
        "../operator/eager",
        "layers/test_gated_modules.py::test_gradients_that_will_be_differentiated",
    ): [
        (
            "a gated MLP counts what its input depends on twice when gradients are differentiated",
            "[t if t is None else t.view_as(t) for t in inputs]",
            "list(inputs)",
        ),
    ],
    ("gated", "layers/test_gated_modules.py::test_what_only_looks_like_one"): [
        (
            "a gated MLP may do what nobody can follow",
            "        elif what not in _NOTHING:",
            "        elif False:",
        ),
        (
            "a gated MLP may make something beside",
            'elif what == "RETURN_VALUE" and stack[-1].count("(") == made:',
            'elif what == "RETURN_VALUE":',
        ),
    ],
    ("gated", ("layers/test_gated_modules.py::test_what_a_forward_loads_is_looked_up_each_time")): [
        ("a gated MLP's forward is read once", "if _form(_code(kind))[0] != form:", "if False:"),
        (
            "a gated MLP's layers are its children, whatever hides them",
            "[getattr(module, name, None) for name in form.names]",
            "[module._modules[name] for name in form.names]",
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
            "return other_call or bool(",
            "return bool(",
        ),
    ],
    ("gated", "layers/test_gated_modules.py::test_what_a_forward_does_not_load_is_free"): [
        (
            "a gated MLP's gelu is always the exact one",
            '.get(str(given.get("approximate", "none")))',
            '.get("none")',
        ),
    ],
    ("gated", "layers/test_gated.py::test_first_and_second_derivatives"): [
        (
            "second derivatives of a gated MLP are those of no product",
            "ACTIVATIONS[activation][0](g) * u, projections[2:],",
            "ACTIVATIONS[activation][0](g), projections[2:],",
        ),
    ],
}
MUTANTS = [
    Mutant(what, os.path.normpath(f"fastlora/layers/{file}.py"), right, wrong, tests)
    for (file, tests), copies in COPIES.items()
    for what, right, wrong in copies
]
