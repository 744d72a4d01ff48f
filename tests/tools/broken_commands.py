# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the command line, and what must notice each."""

from __future__ import annotations

from broken_copies import Mutant

CTRL_C = "finetune::test_ctrl_c_leaves_a_run_that_goes_on"
OTHERWISE = "data::test_an_answer_that_a_template_writes_otherwise_later_is_context"
SAMPLER = "return SequentialSampler(self.train_dataset)"

# By file and the test that must notice: what, right, wrong.
COPIES = {
    ("shared", "finetune::test_a_run_that_diverges_says_so"): [
        ("losses that are not finite are trained on", "if not math.isfinite(loss):", "if False:"),
    ],
    ("finetune", CTRL_C): [
        ("Ctrl-C is not noticed", "    except KeyboardInterrupt:", "    except ZeroDivisionError:"),
        ("a half checkpoint is gone on from", "with contextlib.suppress(ValueError):", "if True:"),
    ],
    ("finetune", "finetune::test_other_settings_and_other_data_are_refused"): [
        ("a run goes on with other data", "Path(self.data).read_bytes()", 'b""'),
    ],
    ("data", "data::test_only_answers_are_learnt"): [
        ("the prompt is learnt, too", "part if learnt else [IGNORED] * len(part)", "part"),
    ],
    ("data", OTHERWISE): [
        ("an answer written otherwise is learnt", "if not before.startswith(done):", "if False:"),
    ],
    ("trainer", "finetune::test_the_first_loss_is_that_of_the_batch"): [
        ("the sampler has its own order", SAMPLER, "return super()._get_train_sampler()"),
    ],
    ("trainer", "launch::test_two_processes_go_on_from_one"): [
        ("one process's tokens are counted", 'self.accelerator.reduce(count, "sum")', "count"),
    ],
    ("rank_search", "ranks::test_what_is_tried_and_taken_and_why"): [
        ("a gain that seeds do not agree on is one", " and fmean(gains) > noise(gains)", ""),
    ],
    ("info", "tune::test_info_refuses_what_layers_refuse"): [
        ("info takes any name", "return failures + 1", "return failures"),
    ],
}
MUTANTS = [
    Mutant(what, f"fastlora/commands/{file}.py", right, wrong, f"commands/test_{test}")
    for (file, name), copies in COPIES.items()
    for test in [name.replace("::", ".py::")]
    for what, right, wrong in copies
]
