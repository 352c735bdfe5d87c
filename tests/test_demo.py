"""`make demo` shows every step, and deletes no folder that it has not made."""

from experiments import demo, verify


def test_the_demo_shows_the_whole_way(tmp_path, monkeypatch, capsys):
    checked = []
    monkeypatch.setattr(
        verify, "_in_fresh_process", lambda folder, *probes: checked.append(folder) or []
    )  # see test_verify
    folder = tmp_path / "demo"
    assert demo.main(["--folder", str(folder)]) == 0
    output = " ".join(capsys.readouterr().out.split())
    for text in (
        "gradpruner + lora",
        "layer 4",
        "merged into layer 3",
        "dropped",
        "0 failed",
        "its numbers mean nothing",
    ):
        assert text in output, text
    assert checked == [folder / "run" / "checkpoint"]
    kept = folder / "run" / "record.json"
    first = kept.stat().st_mtime_ns
    monkeypatch.setattr(verify, "_in_fresh_process", lambda *_: [verify.Check("logits", False, "differ")])
    assert demo.main(["--folder", str(folder)]) == 1  # made anew
    assert kept.stat().st_mtime_ns > first and "NO logits: differ" in capsys.readouterr().out


def test_a_folder_of_someone_else_is_refused(tmp_path, capsys):
    (tmp_path / "precious").touch()
    assert demo.main(["--folder", str(tmp_path)]) == 1
    assert "the demo deletes what is in its folder, got" in capsys.readouterr().err
    assert (tmp_path / "precious").is_file()
