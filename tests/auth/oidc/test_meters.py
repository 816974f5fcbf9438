from whaled.auth.oidc.meters import IssuerMeter
from whaled.registry import Registry


def test_the_series_of_an_issuer_exist_while_it_is_configured() -> None:
    registry = Registry()
    meter = IssuerMeter(registry)

    def values() -> list[float | None]:
        names = ("key_fetches_total", "key_fetch_failures_total", "keys", "keys_fetched_timestamp_seconds")
        return [registry.collectors.get_sample_value(f"whaled_issuer_{name}", {"issuer": "corp"}) for name in names]

    assert values() == [None] * 4
    meter.begins("corp")
    assert values() == [0, 0, 0, 0]
    meter.fetched("corp", 2, 30.0)
    meter.failed("corp")
    meter.begins("corp")
    assert values() == [1, 1, 2, 30]
    meter.ends("corp")
    meter.fetched("corp", 2, 40.0)  # it had begun before the reload
    meter.failed("corp")
    assert values() == [None] * 4
