# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the command line, and what must notice each."""

from __future__ import annotations

from broken_copies import Mutant

# By file and the test that must notice: what, right, wrong.
COPIES = {
    ("trainer", "finetune::test_a_run_that_diverges_says_so"): [
        ("losses that are not finite are trained on", "if not math.isfinite(loss):", "if False:"),
    ],
    ("__main__", "finetune::test_ctrl_c_leaves_a_run_that_goes_on"): [
        ("Ctrl-C ends well", "return 130", "return 0"),
    ],
    ("finetune", "finetune::test_ctrl_c_leaves_a_run_that_goes_on"): [
        ("a half checkpoint is gone on from", "with contextlib.suppress(ValueError):", "if True:"),
    ],
    ("finetune", "finetune::test_other_settings_and_other_data_are_refused"): [
        ("a run goes on with other data", "Path(s.data).read_bytes()", 'b""'),
    ],
    ("data", "data::test_answers_and_whole_texts_are_learnt"): [
        ("later answers of a talk are left out", "for i in answers]", "for i in answers[:1]]"),
        ("answers have no question", '"prompt": talk[:i]', '"prompt": talk[i - 1 : i]'),
    ],
    ("trainer", "launch::test_two_processes_go_on_from_one"): [
        ("the data's last examples are a step", "= len(training) >= s.batch_size", "= False"),
        (
            "one process's tokens are counted",
            'self.accelerator.reduce(learnt.sum(), "sum")',
            "learnt.sum()",
        ),
    ],
    ("trainer", "finetune::test_a_run_that_is_stopped_at_its_end_makes_no_step_too_many"): [
        ("a run goes on from its end", "state.global_step < state.max_steps", "True"),
    ],
    ("trainer", "finetune::test_peft_loads_the_adapter_with_the_loss_that_was_measured"): [
        ("held-out loss is the mean of batches", ".item() * learnt", ".item()"),
    ],
    ("ranks", "ranks::test_what_is_tried_and_taken_and_why"): [
        ("a gain that seeds do not agree on is one", " and self.gain > self.noise", ""),
    ],
    ("info", "tune::test_info_refuses_what_layers_refuse"): [
        ("info takes any name", "return isinstance(error, RuntimeError), f", "return True, f"),
    ],
}
MUTANTS = [
    Mutant(what, f"fastlora/{folder}{file}.py", right, wrong, f"commands/test_{test}")
    for (file, name), copies in COPIES.items()
    for test in [name.replace("::", ".py::")]
    for folder in ["" if file == "__main__" else "commands/"]
    for what, right, wrong in copies
]
