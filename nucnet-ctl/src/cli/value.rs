//! From what was typed to values; an error names the flag.

use std::{net::IpAddr, str::FromStr};

use nucnet_ctl::{
    Error,
    model::{Invalid, parse_ip},
};

pub(super) fn one<T: FromStr<Err = Invalid>>(text: &str, field: &'static str) -> Result<T, Error> {
    Ok(text.parse::<T>().map_err(|invalid| invalid.of(field))?)
}

pub(super) fn optional<T: FromStr<Err = Invalid>>(
    text: Option<&str>,
    field: &'static str,
) -> Result<Option<T>, Error> {
    text.map(|text| one(text, field)).transpose()
}

pub(super) fn all<T: FromStr<Err = Invalid>>(
    texts: &[String],
    field: &'static str,
) -> Result<Vec<T>, Error> {
    texts.iter().map(|text| one(text, field)).collect()
}

pub(super) fn addresses(texts: &[String], field: &'static str) -> Result<Vec<IpAddr>, Error> {
    Ok(texts
        .iter()
        .map(|text| parse_ip(field, text))
        .collect::<Result<_, _>>()?)
}
