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


def test_only_what_was_measured_and_in_a_fixed_order():
    assert metric_columns([]) == []
    values = {"answer_nll": 1.0, "answer_nll_stderr": 0.1, "accuracy_norm": 0.3, "accuracy_norm_stderr": 0.1}
    assert [column.label for column in metric_columns([values])] == ["acc. norm", "answer NLL"]
