"""Only comparable values share a column."""

from gradpruner.reporting.labels import describe_origins, metric_columns


def text(encoder="roberta-large", layer=17, **more):
    values = {"rouge_l": 0.2, "rouge_l_stderr": 0.01, "similarity": 0.5, "similarity_stderr": 0.02}
    return {**values, "bertscore_encoder": encoder, "bertscore_layer": layer, **more}


def test_one_encoder_one_column():
    columns = metric_columns([text(), text()])
    assert [column.label for column in columns] == ["similarity", "ROUGE-L"]
    assert columns[0].cell(text()) == "0.500 ±0.020"


def test_values_of_different_encoders_are_never_in_one_column():
    records = [text(), text("packaged:minilm", 5), text(layer=18)]
    columns = metric_columns(records)
    assert [column.label for column in columns] == [
        "similarity (roberta-large, layer 17)",
        "similarity (packaged:minilm, layer 5)",
        "similarity (roberta-large, layer 18)",
        "ROUGE-L",
    ]
    for record in records:
        assert [column.cell(record) for column in columns[:3]].count("-") == 2
    assert "BERTScore F1 with packaged:minilm, layer 5, not rescaled" in describe_origins(records)


def test_accuracy_by_likelihood_and_by_generation_are_different_things():
    records = [{"accuracy": 0.5, "accuracy_stderr": 0.1, "accuracy_mode": mode} for mode in ("likelihood", "generate")]
    columns = metric_columns(records)
    assert [column.label for column in columns] == ["accuracy (likelihood)", "accuracy (generate)"]
    assert [column.cell(records[0]) for column in columns] == ["0.500 ±0.100", "-"]
    assert describe_origins(records[1:]) == ["accuracy: exact match of the generated answer"]


def generated(match, **more):
    values = {"accuracy": 0.5, "accuracy_raw": 0.4, "accuracy_lenient": 0.5, "accuracy_mode": "generate"}
    return {**values, **{f"{name}_stderr": 0.1 for name in values}, "accuracy_match": match, **more}


def test_raw_and_lenient_accuracy_never_share_a_column():
    columns = metric_columns([generated("lenient")])
    assert [column.label for column in columns] == ["accuracy", "acc. raw"]  # acc. lenient would be accuracy again
    assert [column.label for column in metric_columns([generated("raw")])] == ["accuracy", "acc. lenient"]
    both = [generated("lenient"), generated("raw")]
    labels = ["accuracy (generate, lenient)", "accuracy (generate, raw)", "acc. raw", "acc. lenient"]
    columns = metric_columns(both)
    assert [column.label for column in columns] == labels
    assert [column.cell(both[1]) for column in columns[:2]] == ["-", "0.500 ±0.100"]
    assert describe_origins(both[1:]) == ["accuracy: the generated answer equals the reference exactly"]
    assert "a full stop" in describe_origins(both[:1])[0]


def test_stemmed_rouge_l_is_another_measure():
    records = [text(), text(rouge_stemming=False), text(rouge_stemming=True)]
    columns = metric_columns(records)
    assert [column.label for column in columns] == [
        "similarity (roberta-large, layer 17)",
        "similarity (roberta-large, layer 17, stemmed)",
        "ROUGE-L",
        "ROUGE-L (stemmed)",
    ]
    assert "stemmed ROUGE-L: of the stems of words" in describe_origins(records)
    assert not any("stem" in sentence for sentence in describe_origins(records[:2]))


def test_only_what_was_measured_and_in_a_fixed_order():
    assert metric_columns([]) == []
    values = {"answer_nll": 1.0, "answer_nll_stderr": 0.1, "accuracy_norm": 0.3, "accuracy_norm_stderr": 0.1}
    assert [column.label for column in metric_columns([values])] == ["acc. norm", "answer NLL"]
