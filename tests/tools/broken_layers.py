# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the layers: a line each, and what must notice it."""

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
SIBLINGS, CIRCUMSTANCES, SEARCH, GATED, MODULES = (
    f"layers/test_{name}.py::test_"
    for name in ["siblings", "sibling_circumstances", "sibling_search", "gated", "gated_modules"]
)
INPUT = (
    "forward(self, input: Tensor) -> Tensor:",
    "forward(self, x: Tensor) -> Tensor:\n        input = x",
)

NORM = "layers/test_dora_norms.py::test_"
DORA = "peft/test_dora.py::test_"

# By file and the tests that must notice: what, right, wrong.
COPIES = {
    ("dora", f"{NORM}as_in_float64"): [
        ("rows that cancel keep the digits left", "CANCELS = 1 / 8", "CANCELS = 0.0"),
        ("rows are formed in float32", "else torch.float64", "else own.dtype"),
        ("scaling counts once", "to(own.dtype) * scaling", "to(own.dtype)"),
    ],
    ("dora", f"{NORM}factors_that_cancel_each_other"): [
        ("factors may cancel each other", "alpha=1 / 8", "alpha=0.0"),
    ],
    ("dora", f"{NORM}nothing_as_large_as_the_weight_is_made"): [
        ("rows are formed of large adapters", "alpha=1 / 8", "alpha=64.0"),
        ("the whole weight in float32", "for part in parts]", "for part in [weight]]"),
    ],
    ("dora", f"{NORM}where_nobody_may_wait_for_a_number"): [
        ("no row is formed", "min(MOST_FORMED, len(left))", "0"),
    ],
    ("dora", f"{DORA}the_frozen_layer_at_the_start"): [
        ("norms are wider than magnitudes", "scaling).to(a.dtype)", "scaling)"),
    ],
    ("dora", f"{DORA}as_peft"): [
        ("norms have a gradient", "with torch.no_grad():", "if True:"),
    ],
    ("dora", f"{DORA}no_norm_of_what_has_changed"): [
        ("nobody sees what is written to", "else t._version", "else 0"),
        ("train() changes nothing", '.pop("whole", None)', ""),
        ("scaling changes nothing", '"whole", (source, a, b, scaling)', '"whole", (source, a, b)'),
    ],
    ("dora", f"{DORA}memory_that_is_used_again"): [
        ("a weight's place is its name", "StorageWeakRef(t.untyped_storage()), t.data", "t.data"),
    ],
    ("dora", f"{DORA}norms_are_made_once_in_evaluation"): [
        ("each token makes the norms", "if magnitude.training:", "if True:"),
        ("norms are kept while training", "if magnitude.training:", "if False:"),
    ],
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
        ("merged layers' copies are not known", "self.merged:\n            _m", "0: _m"),
    ],
    ("lora", f"{LAYER}layers_made_meanwhile_disturb_no_merge"): [
        ("merging looks at every layer", "self.merged:\n            _m", "1: _m"),
    ],
    ("lora", f"{LAYER}sharded"): [
        (
            "what is sharded is merged",
            "elif self._quantised or type(weight) not in PLAIN:",
            "elif False:",
        ),
    ],
    ("lora", f"{LAYER}safe_merge_refuses_infinities_and_changes_nothing"): [
        ("a safe merge takes what is not finite", "if safe and not", "if False and not"),
    ],
    ("lora", NOT_TWICE): [
        ("a state saved while merged is loaded as another", NO_BASE, "_ = torch.empty_like("),
        ("merged layers stay merged when loaded", "elif self.merged and", "elif 0 and"),
        ("the state that is loaded is written to", NO_BASE, f"self.unmerge(); {NO_BASE}"),
    ],
    ("lora", f"{LAYER}a_base_checkpoint_loads_unchanged"): [
        ("a base checkpoint has to hold adapters", "if adapter.keys().isdisjoint", "if 0 and"),
    ],
    ("lora", f"{LAYER}meta_device"): [
        ("what is drawn again stays merged", "self.base_weight = None\n            self", "self"),
    ],
    ("lora", f"{LAYER}what_cannot_become_a_lora_layer"): [
        ("a dropout of NaN is taken", "0 <= p <= 1,", "not (p < 0 or p > 1),"),
        ("True is a number", " and not isinstance(value, bool)", ""),
        ("a compiled layer is copied", "module._compiled_call_impl is not None", "False"),
    ],
    ("replace", f"{REPLACE}what_cannot_be_is_refused_and_nothing_changed"): [
        ("what compile has wrapped is replaced inside", "if module in compiled", "if False"),
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
    ("lora", "layers/test_sibling_circumstances.py::test_keywords"): [
        ("the layer has its own name for its input", *INPUT),
    ],
    ("../functional", f"{DRAWN_AGAIN} {OTHER_MASK}"): [
        ("two adapters drop the same", "else new_seed(x.device)", "else torch.ones(1).long()"),
    ],
    ("../operator/segments", "operator/test_segments.py::test_as_a_loop"): [
        (
            "a rank is taken for the widest",
            "F.pad(b[g], (0, missing))",
            "F.pad(b[g], (missing, 0))",
        ),
        ("a segment without rows counts", "last -= one.w.start == one.w.stop", "last -= 1"),
        ("segments that are no neighbours go together", "(w.start - size * i, size,", "(size,"),
        (
            "an adapter is for all of its kind",
            "(one[j] for one in others)",
            "(first[j] for _ in others)",
        ),
    ],
    ("../operator/op", DRAWN_AGAIN): [
        ("several adapters keep what they drop", 'if impl == "eager" or (', "if not whole or ("),
    ],
    ("../operator/op", "layers/test_active.py::test_compiles_in_one_graph"): [
        ("several adapters do not compile", "(transformed() or not whole)", "transformed()"),
    ],
    ("siblings", f"{CIRCUMSTANCES}any_order"): [
        ("siblings of another tensor are handed out", "_held.x is x and ", ""),
        ("siblings are handed out after x was written to", "*how, x._version,", "*how, 0,"),
        ("siblings outlive a backward", "if node is not None and not hasattr(", "if 0 and ("),
        ("siblings are taken for no views", "hasattr(node.next_functions[0][0],", "hasattr(node,"),
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
    ("siblings", f"{CIRCUMSTANCES}what_was_switched_in_between"): [
        ("siblings leave inference mode", "torch.is_inference_mode_enabled(), ", ""),
        ("siblings leave a dispatch mode", "torch._C._len_torch_dispatch_stack()", "0"),
        ("siblings come without gradients", "how = torch.is_grad_enabled(),", "how = True,"),
    ],
    ("gated", f"{CIRCUMSTANCES}compiled_and_transformed"): [
        ("siblings leave a transform", " or op.transformed() or", " or"),
    ],
    ("gated", f"{CIRCUMSTANCES}hooks_on_a_member"): [
        ("hooks change the x of some siblings", "member._forward_pre_hooks or ", ""),
    ],
    ("gated", f"{CIRCUMSTANCES}inference_mode_few_tokens_and_what_a_layer_would_refuse"): [
        ("a few tokens go the way of many", " and not plans.is_few(x.numel(), x.device)", ""),
    ],
    ("siblings", f"{CIRCUMSTANCES}keywords"): [("frozen siblings name their input", *INPUT)],
    ("siblings", f"{SIBLINGS}copies_are_siblings_of_their_own"): [
        ("siblings are copied with their parent or not at all", "if parent is None else", "and"),
    ],
    ("siblings", f"{CIRCUMSTANCES}another_stream"): [
        ("siblings are handed out on another stream", "dtype, stream, *modes", "dtype, *modes"),
    ],
    ("siblings", f"{SIBLINGS}the_same_outputs_gradients_and_dropout"): [
        ("siblings are handed out twice", "seats.pop(id(member))", "seats.get(id(member))"),
    ],
    ("siblings", f"{SIBLINGS}many_threads"): [
        ("threads share what is held", "class _Held(threading.local):", "class _Held:"),
    ],
    ("siblings", f"{SIBLINGS}a_group_that_misses_is_given_up_and_says_so_once"): [
        ("siblings part in vain", "vars(member).pop(", "vars(member).get("),
        ("one miss in a hundred parts siblings", "max(0, _held.group.misses - 1)", "8"),
    ],
    ("siblings", f"{SIBLINGS}a_group_that_misses_in_checkpoints_goes_on"): [
        ("siblings part before a checkpoint's backward", "[:3] == (True, None, -1)", ""),
        ("siblings part within one", "[:3] == (True, None, -1)", "[:2] == (True, None)"),
    ],
    ("sample_inputs", f"{SEARCH}an_input_is_made_by_what_a_model_says"): [
        ("images have one channel", 'said("num_channels", "in_channels", default=3)', "1"),
        ("spectrograms lie one way round", "(128, bands), (bands, whole)", "(bands, whole)"),
    ],
    ("siblings", f"{SEARCH}an_error_names_only_what_the_model_has"): [
        ("errors name what is not there", "[tuple(several[:3]) for", "[('q', 'k') for"),
    ],
    ("siblings", f"{MODULES}the_report_says_why_not"): [
        ("no report says why a module is no gated MLP", "lookalikes.append(", "lookalikes.count("),
    ],
    ("siblings", f"{MODULES}what_has_the_formula_of_one_and_is_none"): [
        ("a gated MLP may have its own forward", 'if "forward" in vars(parent):', "if False:"),
        ("a gated MLP may call other layers", "if ({*own[:2]}, ", "if False and ({*own[:2]}, "),
        ("a gated MLP's layers may be hidden", "if getattr(parent, n, 0) is (", "if 0 is not ("),
        ("classes without heirs are errors", "Exception as error:  # wh", "KeyError as error:  #"),
    ],
    ("siblings", f"{SIBLINGS}the_latest_patch_says_what_is_together"): [
        ("earlier groups go on", 'pop("_siblings", None)\n    for p', "keys()\n    for p"),
    ],
    ("siblings", f"{CIRCUMSTANCES}inference_mode_few_tokens_and_what_a_layer_would_refuse"): [
        ("quantised layers are taken for plain ones", "if kinds <= {*op.PLAIN,", "if 1 or {"),
    ],
    ("gated", f"{GATED}acceptance_rule"): [
        ("the gated MLP forgets up", "return act(g, **how).mul_(u)", "return act(g, **how)"),
        ("up's gradient is that of gate's input", "du = act(g, **how).mul_(dh)", "du = g * dh"),
    ],
    ("gated", f"{GATED}first_and_second_derivatives"): [
        ("a gated MLP's second derivatives forget up", "[dh * u], g,", "[dh * u.detach()], g,"),
    ],
    ("../operator/eager", f"{GATED}first_and_second_derivatives"): [
        ("what depends on x counts twice", "t.view_as(t) for t in inputs", "t for t in inputs"),
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
        ("a hidden layer is read", "getattr(module, name, None) for", "module._modules[name] for"),
        (
            "a gated MLP's layers may do more than theirs",
            'return "sibling_operands" in own and',
            'return hasattr(type(module), "sibling_operands") and',
        ),
        ("an activation may be called otherwise", "type(module).__call__ is not _CALL or ", ""),
    ],
    ("gated", f"{MODULES}what_a_forward_does_not_load_is_free"): [
        ("every gelu is the exact one", " and given.items() <= how.items()", ""),
    ],
}
MUTANTS = [
    Mutant(what, os.path.normpath(f"fastlora/layers/{file}.py"), right, wrong, tests)
    for (file, tests), copies in COPIES.items()
    for what, right, wrong in copies
]
