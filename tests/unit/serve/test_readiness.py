from janus_ray.serve.readiness import Readiness


def test_a_caller_is_told_to_come_back_when_the_start_will_be_over():
    now_s = [100.0]
    readiness = Readiness(["m"], clock=lambda: now_s[0])
    assert readiness.states() == {"m": "starting"} and readiness.retry_after_s("m") == 10
    now_s[0] += 40
    assert readiness.retry_after_s("m") == 1
    readiness.mark_ready("m", "w")
    now_s[0] += 1000
    assert readiness.retry_after_s("m") == 40
    readiness.mark_lost("m")
    # The start took 40 s, and so will the restart.
    assert readiness.states() == {"m": "restarting"} and readiness.retry_after_s("m") == 40
    now_s[0] += 29.5
    assert readiness.retry_after_s("m") == 11
    readiness.mark_lost("m")
    assert readiness.retry_after_s("m") == 11
    now_s[0] += 0.5
    readiness.mark_ready("m", "new")
    readiness.mark_ready("m", "ignored")
    assert readiness.weights_ids == {"m": "new"}
    readiness.mark_lost("m")
    assert readiness.retry_after_s("m") == 30


def test_one_word_for_all_models():
    readiness = Readiness(["a", "b"])
    assert readiness.status() == "starting"
    readiness.mark_lost("a")
    assert readiness.states()["a"] == "starting"
    readiness.mark_ready("a")
    assert readiness.status() == "starting"
    readiness.mark_ready("b")
    assert readiness.status() == "ok"
    readiness.mark_lost("b")
    assert readiness.status() == "restarting"
    readiness.stopping = True
    assert readiness.status() == "stopping"
