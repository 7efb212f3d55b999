"""Dates as people write them, each beside its ISO 8601 form: data for the small Transformer, made by rule.

    the 3rd of March, 1987      Tue 3 Mar 1987      3/3/87      -->      1987-03-03

Every day from 1970 to 2069 is written in templates, and varied as hands vary it: upper or lower case, "Sept"
or "Sep", no commas, spaces around punctuation. Numeric forms have the day first, unless four digits lead. The
years are a hundred, so two digits leave no doubt: 70 to 99 are 19xx, 00 to 69 are 20xx.

    python -m runs_train.dates_data > dates.tsv       lines of source TAB target TAB template

Proof: tests/test_train_seq2seq.py, with the standard library's datetime.
"""

import random
import re
import sys
from datetime import date, timedelta

if not __package__:
    print("error: start it as: python -m runs_train.dates_data, in the project's folder", file=sys.stderr)
    sys.exit(2)

from models.utils.errors import run_main

FIRST_DAY, LAST_DAY = date(1970, 1, 1), date(2069, 12, 31)

# Of (day of the 3rd of March, 1987): d 3, dd 03, nth 3rd; m 3, mm 03, mon Mar, month March; yy 87, year 1987;
# wkd Tue, weekday Tuesday.
TEMPLATES = (
    "the {nth} of {month}, {year}",
    "the {nth} of {month} {year}",
    "{nth} of {month} {year}",
    "{nth} of {mon} '{yy}",
    "{nth} {month} {year}",
    "{nth} {month} {yy}",
    "{nth} {mon}, {year}",
    "{month} the {nth}, {year}",
    "{month} {nth}, {year}",
    "{month} {d}, {year}",
    "{month} {d} '{yy}",
    "{mon} {d}, {year}",
    "{mon}. {d}, {year}",
    "{mon} {nth} {year}",
    "{d} {month} {year}",
    "{d} {month}, {year}",
    "{d} {month} '{yy}",
    "{d} {mon} {year}",
    "{dd} {mon} {yy}",
    "{d}-{mon}-{year}",
    "{dd}-{mon}-{yy}",
    "{weekday}, {d} {month} {year}",
    "{weekday}, {month} {d}, {year}",
    "{weekday}, {month} {nth}, {year}",
    "{weekday} the {nth} of {month}, {year}",
    "{weekday} {nth} {month} {year}",
    "{weekday} {d} {mon} '{yy}",
    "{wkd} {d} {mon} {year}",
    "{wkd}, {dd} {mon} {year}",
    "{wkd} {mon} {d} {year}",
    "{wkd} {d}/{m}/{year}",
    "{d}/{m}/{yy}",
    "{d}/{m}/{year}",
    "{dd}/{mm}/{yy}",
    "{dd}/{mm}/{year}",
    "{d}.{m}.{yy}",
    "{dd}.{mm}.{year}",
    "{d}. {m}. {year}",
    "{d}-{m}-{yy}",
    "{dd}-{mm}-{year}",
    "{year}-{mm}-{dd}",
    "{year}/{m}/{d}",
    "{year} {month} {d}",
)

# Not strftime's, which speak the language of the machine.
MONTHS = ["January", "February", "March", "April", "May", "June", "July"]
MONTHS += ["August", "September", "October", "November", "December"]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
LONGER_SHORT_FORMS = {"Sep": ("Sep", "Sept"), "Tue": ("Tue", "Tues"), "Thu": ("Thu", "Thur", "Thurs")}


def all_days():
    return [FIRST_DAY + timedelta(days=n) for n in range((LAST_DAY - FIRST_DAY).days + 1)]


def write_date(day, template, rng):
    """One way to write `day`; what is left open is drawn from `rng`, a random.Random."""
    text = template.format_map(fields_of(day, rng))
    if rng.random() < 0.2:
        text = text.replace(",", "")
    if rng.random() < 0.2:
        # "March 3,1987" or "3 / 3/87": spaces come and go beside punctuation.
        text = re.sub(r" ?([,./-]) ?", lambda found: respaced(found, rng), text)
    return rng.choice((text, text, text, text.lower(), text.upper()))


def fields_of(day, rng):
    mon, wkd = MONTHS[day.month - 1][:3], WEEKDAYS[day.weekday()][:3]
    return {
        "d": day.day, "dd": f"{day.day:02}", "nth": ordinal(day.day),
        "m": day.month, "mm": f"{day.month:02}", "month": MONTHS[day.month - 1],
        "mon": rng.choice(LONGER_SHORT_FORMS.get(mon, (mon,))),
        "yy": f"{day.year % 100:02}", "year": day.year,
        "wkd": rng.choice(LONGER_SHORT_FORMS.get(wkd, (wkd,))), "weekday": WEEKDAYS[day.weekday()],
    }  # fmt: skip


def respaced(found, rng):
    return rng.choice(("", " ")) + found[1] + rng.choice(("", " "))


def ordinal(number):
    """1st, 2nd, 3rd, 4th; but 11th, 12th, 13th."""
    teen = 10 < number % 100 < 14
    return f"{number}{'th' if teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def write_days(days, per_day, seed):
    """(source, target, template) of every day in `per_day` of the templates, drawn for each day anew."""
    rng = random.Random(seed)
    for day in days:
        for template in rng.sample(TEMPLATES, per_day):
            yield write_date(day, template, rng), day.isoformat(), template


def main():
    for row in write_days(all_days(), len(TEMPLATES), seed=0):
        print("\t".join(row))


if __name__ == "__main__":
    run_main(main)
