"""Lineage: without part three, in the lean script, all else runs and gives the same bytes and scores."""

import ast

import pytest
from conftest import (
    SHALLOW,
    environment,
    imported,
    load_config,
    run_script,
    settings,
    settings_of,
    summary,
    tg,
    whole_run,
    without,
)

LATE = ("best", "pr1855", "pr1924", "pr2014", "pr2135")
COMMON = {f.name for f in tg.fields(tg.Settings.__base__)}
OLDER = [f for f in tg.fields(tg.Settings) if f.name not in COMMON]
SOURCE = tg.Path(tg.__file__).read_bytes()
LEAN = tg.lean(SOURCE)
SCORES = ("prequant_val_bpb", "quantized_val_bpb", "sliding_val_bpb", "val_bpb", "val_loss")


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The lean script, imported."""
    path = tmp_path_factory.mktemp("lean") / "train_gpt.py"
    path.write_bytes(LEAN)
    return imported(path)


# --- the cut

def test_a_parameter_added_to_the_system_is_in_the_whole_script_too(monkeypatch):
    monkeypatch.setitem(tg.PARAMETERS, "new_gate", tg.Parameter("num_layers 3"))
    s = settings()
    assert list(tg.LineageGPT.shapes(s).items())[-1] == ("new_gate", (s.num_layers, 3))


def test_cutting_again_cuts_nothing():
    assert tg.lean(LEAN) == LEAN and len(LEAN) < 0.95 * len(SOURCE)


def test_the_lean_script_has_no_setting_of_an_older_system(cut, capsys):
    assert len(OLDER) > 30 and {f.name for f in cut.fields(cut.Settings)} == COMMON
    assert cut.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name.upper()} " in shown for name in COMMON) and "ACCEPTED OLD NAMES" in shown
    assert not any(f"  {f.name.upper()} " in shown for f in OLDER)


# --- settings


@pytest.mark.parametrize("name", LATE)
def test_late_systems_are_read_as_by_the_whole_script(cut, name):
    whole, lean = (script.Settings.from_env(load_config(name)).as_env() for script in (tg, cut))
    assert lean == {k: whole[k] for k in lean} and len(lean) == len(COMMON)


def test_settings_of_older_systems_keep_their_one_value(cut):
    """Every default is taken, as a run's summary gives it; anything else stops the run."""
    idle = {f.name.upper(): int(f.default) if f.default in (True, False) else f.default for f in OLDER}
    assert settings_of(cut, **idle, MUONEQ_R=1) == settings_of(cut)
    other = dict(VE_ENABLED=1, SKIP_ROWS="physical", MATRIX_LR_EARLY=0.03, CORRECTOR_ORDERS="2,3", MUONEQ_R=0)
    for name, value in other.items():
        with pytest.raises(cut.UserError, match=f"^{name}={value} .* lean script leaves out"):
            settings_of(cut, **{name: value})


BEYOND = dict(SMEAR_GATE_KIND="channels", BIGRAM_VOCAB_SIZE=800, QUANT_CLIP="percentile",
              TRAIN_LOADER="coprime", TTT_OPTIMIZER="sgd", MATRIX_LR_EARLY=0.03, PREQUANT_TTT_ENABLED=1,
              LN_SCALE=0, LQER_ASYM_ENABLED=0, GLOBAL_TTT_WARMUP_CHUNKS=2, TTT_SHORT_CHUNK_SIZE=8)


@pytest.mark.parametrize("name", BEYOND)
def test_what_only_older_systems_have_needs_the_whole_script(name):
    assert tg.shipped_form(settings(**{name: BEYOND[name]}, CODE_FORM="auto")) == "packed"
    for form in ("lean", "lean_packed"):
        with pytest.raises(tg.UserError, match=f"^CODE_FORM={form} .*{name}.*CODE_FORM=auto"):
            settings(**{name: BEYOND[name]}, CODE_FORM=form)


def test_the_older_form_of_short_chunks_needs_it_where_it_is_in_force():
    """Without steps the older form gives one by default; the lean script has none."""
    s = settings(TTT_SHORT_SCORE_FIRST_STEPS="", CODE_FORM="auto")
    assert tg.chunk_rules(s)[0] == (2000, 24) and tg.shipped_form(s) == "packed"
    s = settings(TTT_SHORT_SCORE_FIRST_STEPS="", TTT_SHORT_DOC_LEN=500, TTT_SHORT_CHUNK_SIZE=8)
    assert tg.chunk_rules(s)[0] == (500, 8)
    s = settings(TTT_SHORT_SCORE_FIRST_STEPS="", TTT_SHORT_SCORE_FIRST_ENABLED=0, CODE_FORM="auto")
    assert len(tg.chunk_rules(s)) == 1 and tg.shipped_form(s) == "lean_packed"


def test_what_the_system_has_does_not(cut):
    same = dict(TRAIN_LOADER="docpack", TTT_OPTIMIZER="adam", LQER_ENABLED=1, SKIP_ROWS="looped", VE_DIM=128)
    for script in (tg, cut):
        s = settings_of(script, **same, CODE_FORM="auto")
        assert s.beyond_the_system() == [] and script.shipped_form(s) == "lean_packed"
        for form in script.CODE_FORMS:
            assert script.shipped_form(settings_of(script, **same, CODE_FORM=form)) == form


# --- what is counted

@pytest.mark.parametrize("source", [SOURCE, LEAN])
def test_a_packed_script_is_the_script_line_by_line_but_for_what_is_not_run(source):
    """Of a source with comments behind code, in text and in nested definitions, too."""
    sample = b'''"""Help."""   # kept: the command line shows it
class A:
    """Doc."""
    def f(self):  # why
        """Two
        lines."""  # behind it
        return "# no comment", """text
# of several lines
"""
    def g(self):
        """The body."""
'''
    plain = tg.without_comments(sample)
    assert b"Help" in plain and b"The body" in plain and b"# no comment" in plain and b"# of several" in plain
    assert not any(gone in plain for gone in (b"kept", b"Doc", b"why", b"Two", b"lines.", b"behind"))
    for text in (sample, source):
        plain = tg.without_comments(text)
        assert structure(plain) == structure(text) and tg.without_comments(plain) == plain
    assert len(plain) < 0.8 * len(source)


def structure(source: bytes) -> str:
    """What runs, and in which lines: all but comments, and docstrings beside other statements."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) and node.body[1:]:
            del node.body[0]
    return ast.dump(tree, include_attributes=True)


def test_forms_are_counted_as_they_are_shipped(cut, tmp_path, monkeypatch):
    """Of the whole script and of the lean one; a packed script is itself, whatever CODE_FORM says."""
    made = {"readable": SOURCE, "packed": tg.self_extracting(SOURCE),
            "lean": LEAN, "lean_packed": tg.self_extracting(LEAN)}
    assert {form: tg.code_bytes(form) for form in tg.CODE_FORMS} == {k: len(v) for k, v in made.items()}
    assert [cut.code_bytes(form) for form in ("readable", "lean")] == 2 * [len(LEAN)]
    for script, form in ((tg, "packed"), (cut, "lean_packed")):
        path = tmp_path / f"{form}.py"
        path.write_bytes(made[form])
        with monkeypatch.context() as patch:
            patch.setattr(script, "script_source", path.read_bytes)
            script.code_bytes.cache_clear()
            for asked in ("auto", "readable", "packed"):
                shipped = script.shipped_form(settings_of(script, CODE_FORM=asked))
                assert shipped == form and script.code_bytes(shipped) == len(made[form])
            with pytest.raises(ValueError, match="shipped_form"):
                script.code_bytes("auto")
        script.code_bytes.cache_clear()


BRIEF = dict(SHALLOW, VAL_DOC_FRACTION=0.4, EVAL_STRIDE=32)


def test_a_run_of_the_lean_script_is_the_run(cut, data, tmp_path):
    """Artifact, scores and counted bytes are those of the whole script, which ships the lean one."""
    facts = []
    for script, folder in ((tg, tmp_path / "whole"), (cut, tmp_path / "lean")):
        s = settings_of(script, DATA_PATH=data, TOKENIZER_PATH=data / "tokenizer.model",
                        ARTIFACT_DIR=folder, CODE_FORM="lean", ITERATIONS=2, **BRIEF)
        with without("rehearse", "run_probes"):      # of the whole script, as tests of other chapters run it
            whole_run(s, script)
        found = summary(folder)
        assert found["code_form"] == "lean" and found["code_bytes"] == len(LEAN)
        assert found["total_bytes"] == found["artifact_bytes"] + len(LEAN)
        scores = [found[key] for key in SCORES]
        facts.append(((folder / tg.ARTIFACT_NAME).read_bytes(), scores, found["steps"]))
    assert facts[0] == facts[1] and facts[0][2] == 2


@pytest.mark.long      # the forms are counted above, and a run of the lean script counts its own
def test_a_run_counts_the_form_of_the_script_that_it_names(data, tmp_path):
    few = dict(QUANTIZE_ONLY=1, TTT_ENABLED=0, ITERATIONS=1)
    status, output = run_script(environment(data, CODE_FORM="packed", ARTIFACT_DIR=tmp_path, **few))
    assert status == 0, output
    s = summary(tmp_path)
    assert s["code_form"] == "packed" and s["code_bytes"] == tg.code_bytes("packed")
    assert s["total_bytes"] == (tmp_path / "final_model.int6.ptz").stat().st_size + s["code_bytes"]
