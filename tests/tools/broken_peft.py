# SPDX-License-Identifier: Apache-2.0
"""Broken copies of what stands in for PEFT's layers and files, and what must notice each."""

from __future__ import annotations

from broken_copies import Mutant

HOSTILE, FILES = "peft/test_hostile_adapters.py::test_", "peft/test_adapter_files.py::test_"
FUSED, REASONS = "peft/test_peft.py::test_", "peft/test_peft_reasons.py::test_"
WRONG, FAILED = f"{HOSTILE}weights_that_are_wrong", f"{HOSTILE}a_failure_after_all_checks_changes"
CALL = "if not (args or kwargs or self._disable_adapters or self.merged_adapters):"
LOAD = "PeftModel.from_pretrained(model, checked, adapter_name, is_trainable)"
LEFT = "layers/test_sibling_search.py::test_unloaded_models_are_plain"

# By file and the tests that must notice: what, right, wrong.
COPIES = {
    ("linear", f"{LEFT} {FUSED}a_mixed_model"): [
        ("unloaded models have siblings left", "        separate(model)\n", ""),
    ],
    ("linear", f"{FUSED}a_mixed_model"): [
        ("new layers are not fused", "return fuse(super()._create", "return (super()._create"),
    ],
    ("linear", f"{REASONS}what_is_not_fused"): [
        (
            "any weight is taken for a dense one",
            "return type(weight) in _PLAIN and",
            "return True or",
        ),
        ("hooks on what is not called are not seen", "module._forward_hooks\n", "False\n"),
    ],
    ("linear", f"{FUSED}disabled_and_merged"): [
        ("disabled adapters run", CALL, CALL.replace("self._disable_adapters or ", "")),
        ("merged adapters are added again", CALL, CALL.replace(" or self.merged_adapters", "")),
    ],
    ("linear", f"{FUSED}dropout_keeps_what_it_should"): [
        ("dropout goes on in evaluation", "if dropout.training and type", "if type"),
    ],
    ("require", f"{REASONS}a_compiled_model"): [
        (
            "a compiled model is patched",
            '"_orig_mod" in part._modules or part._',
            "False and part._",
        ),
    ],
    ("require", f"{REASONS}a_release_that_was_not_tested"): [
        ("a PEFT that was not tested is patched", "if not first <= release < end:", "if False:"),
    ],
    ("checks", WRONG): [
        (
            "weights that are not finite are loaded",
            "if not finite(t.to(",
            "if False and not (t.to(",
        ),
        (
            "weights finite in float64 alone are loaded",
            "finite(t.to(likes[key].dtype))",
            "finite(t)",
        ),
        (
            "a file may overwrite frozen weights",
            "if frozen := changed - likes.keys():",
            "if frozen := 0:",
        ),
        ("tensors that nobody asked for are taken", "if missing or unexpected:", "if missing:"),
        ("a file without all tensors is taken", "if missing or unexpected:", "if unexpected:"),
    ],
    ("checks", f"{HOSTILE}other_embeddings_have_to_be_allowed"): [
        ("embeddings are overwritten unasked", "if trusted:", "if True:"),
    ],
    ("checks", f"{HOSTILE}tensors_are_not_read_before_the_header_was_compared"): [
        ("tensors of another shape are read", "if tuple(shape) != tuple(like.shape):", "if False:"),
    ],
    ("checks", f"{HOSTILE}a_rank_above_a_layer_s_width_has_to_be_allowed"): [
        ("any rank is allowed", "if r > width and not trusted:", "if False:"),
    ],
    ("checks", f"{HOSTILE}tokens_that_a_model_does_not_have"): [
        ("tokens beyond the end are trained", "if index >= count:", "if False:"),
    ],
    ("checks", "test_faults.py::test_killed_at_every_step_of_saving"): [
        (
            "the config's name decides, not its hash",
            "hash_of(data := _head(path)) == wanted:",
            "(data := _head(path)):",
        ),
    ],
    ("checks", f"{HOSTILE}weights_replaced_between_two_looks_at_them"): [
        (
            "weights are read with the config from before",
            ".get(CONFIG_HASH) != config_hash:",
            ".get(CONFIG_HASH) == 'none':",
        ),
    ],
    ("config", f"{HOSTILE}a_config_file_that_is_malformed"): [
        ("a key that comes twice is taken", "if len(values) != len(pairs):", "if False:"),
    ],
    ("config", f"{HOSTILE}a_kept_attack"): [
        ("a switch of the future is ignored", "if refused:", "if False:"),
    ],
    ("config", f"{HOSTILE}a_config_that_is_wrong"): [
        ("numbers of a config are not checked", "elif not right(value):", "elif False:"),
    ],
    ("files", f"{HOSTILE}a_pattern_that_never_ends"): [
        ("a pattern may run for ever", "(values, names, _PATTERN_SECONDS)", "(values, names, 3.0)"),
    ],
    ("rehearsal", f"{HOSTILE}a_kept_attack"): [
        (
            "an adapter is tried on the model, no copy",
            "made = _skeleton(model, {})",
            "made = model",
        ),
    ],
    ("rehearsal", f"{FAILED}_nothing"): [
        ("a failure leaves classes behind", "            module.__class__ = kind\n", ""),
        ("a failure leaves other biases behind", "tensor.detach().copy_(value)", "pass"),
    ],
    ("files", f"{HOSTILE}what_peft_does_not_load_is_noticed"): [
        ("what PEFT has loaded is not looked at", "    if lost:", "    if False:"),
    ],
    ("files", f"{HOSTILE}what_is_written_to_the_file_meanwhile_reaches_no_model"): [
        ("PEFT reads the file once more", LOAD, LOAD.replace("checked", "folder")),
    ],
    ("files", f"{FILES}what_is_loaded_is_fused"): [
        ("what is loaded is not patched", "            patch_peft(loaded)", "            pass"),
    ],
    ("files", f"{FILES}from_peft_to_peft"): [
        ("a loaded adapter trains unasked", LOAD, LOAD.replace("is_trainable", "True")),
    ],
    ("files", f"{FILES}where_it_cannot_be_written test_faults.py::test_a_disk_that_is_full"): [
        ("an adapter is written in place", "{path: temporary_of(path) for", "{path: path for"),
    ],
    ("files", f"{FILES}a_failing_system_call_leaves_the_old_adapter"): [
        (
            "the first file gets its name before the second is written",
            "os.fsync(file.fileno())\n",
            "os.fsync(file.fileno())\n            os.replace(temporary[path], path)\n",
        ),
    ],
    ("files", f"{FILES}once_the_weights_have_their_name_it_is_the_new_adapter"): [
        (
            "Ctrl-C deletes the config of new weights",
            "if temporary[next(iter(contents))].exists():",
            "if True:",
        ),
    ],
    ("files", f"{FILES}a_merged_or_compiled_model_saves_the_same"): [
        (
            "a merged head is saved with its adapter in it",
            'if any(getattr(module, "merged", False)',
            "if any(False",
        ),
    ],
    ("files", "commands/test_launch.py::test_sharded_processes_come_to_what_one_comes_to"): [
        (
            "a shard is saved for the whole",
            "tensor = tensor.full_tensor()",
            "tensor = tensor.to_local()",
        ),
    ],
}
MUTANTS = [
    Mutant(what, f"fastlora/peft/{file}.py", right, wrong, tests)
    for (file, tests), copies in COPIES.items()
    for what, right, wrong in copies
]
