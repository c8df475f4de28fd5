//! How exactly a clip is denoised.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How exactly the visual tokens' products are computed: linear layers over them and attention. All else is f32, the whole
/// decode too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Precision {
    /// As exact as f32 numbers and f32 sums.
    #[default]
    #[serde(rename = "fp32")]
    F32,
    /// Sums in f32. On machines with matrix units factors are rounded to bf16, and the products take less than half the time. On
    /// others the weights of linear layers alone are. Either way these take half the memory.
    #[serde(rename = "bf16")]
    Bf16,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "fp32",
            Self::Bf16 => "bf16",
        })
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "fp32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            other => Err(format!("no precision {other}; there are fp32 and bf16")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn precisions_are_read_as_they_are_written() {
        for precision in [Precision::F32, Precision::Bf16] {
            assert_eq!(precision.to_string().parse(), Ok(precision));
            assert_eq!(serde_json::to_value(precision).unwrap(), precision.to_string());
        }
        assert!("fp16".parse::<Precision>().unwrap_err().contains("bf16"));
    }
}
