//! The metrics page, built anew for each scrape, so that the series of vanished labels vanish.
//!
//! What the metrics are stands in `metrics`; how the page gets out is `http`'s.

mod metrics;

use ::prometheus::TextEncoder;
use ::prometheus::proto::{self, LabelPair, MetricFamily, MetricType};

use super::process::ProcessMetrics;
use crate::model::NetnsSelection;
use crate::model::view::{DWELL_BUCKETS, Histogram, View};

pub use self::metrics::METRICS;
/// Of a page. With the character set, since names of processes may hold any character.
pub const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Which tcpstate this is, and what it covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildInfo {
    pub version: &'static str,
    /// Of the source, as git names it.
    pub revision: &'static str,
    pub netns: NetnsSelection,
}

/// All that a page is made of.
#[derive(Clone, Copy)]
struct Scrape<'a> {
    view: &'a View,
    process: &'a ProcessMetrics,
    build: &'a BuildInfo,
}

/// One metric: all that there is to say of it, in one place.
#[derive(Debug)]
pub struct Metric {
    pub name: &'static str,
    pub kind: MetricType,
    pub labels: &'static [Label],
    pub help: &'static str,
    /// Its samples in this scrape; a metric without any is not on the page.
    samples: fn(Scrape<'_>, &mut Samples),
}

#[derive(Debug)]
pub struct Label {
    pub name: &'static str,
    /// All values that it can have; `None` where others choose them.
    pub values: Option<fn() -> Vec<String>>,
}

impl Label {
    const fn open(name: &'static str) -> Self {
        Self { name, values: None }
    }
}

/// The page as Prometheus scrapes it ([`TEXT_FORMAT`]).
///
/// # Errors
/// The encoder's; none is known that a page of [`METRICS`] could cause.
pub fn page(
    view: &View,
    process: &ProcessMetrics,
    build: &BuildInfo,
) -> Result<String, ::prometheus::Error> {
    let scrape = Scrape {
        view,
        process,
        build,
    };
    let families = METRICS.iter().filter_map(|metric| {
        let mut samples = Samples {
            metric,
            gathered: Vec::new(),
        };
        (metric.samples)(scrape, &mut samples);
        // The encoder refuses a family without samples.
        (!samples.gathered.is_empty()).then(|| samples.into_family())
    });
    TextEncoder::new().encode_to_string(&families.collect::<Vec<_>>())
}

/// Takes the samples of one metric.
struct Samples {
    metric: &'static Metric,
    gathered: Vec<proto::Metric>,
}

impl Samples {
    /// `labels`: values, in the order in which the metric names its labels.
    fn push(&mut self, labels: &[&str], value: f64) {
        let mut sample = self.labelled(labels);
        match self.metric.kind {
            MetricType::COUNTER => {
                let mut counter = proto::Counter::default();
                counter.set_value(value);
                sample.set_counter(counter);
            }
            _ => {
                let mut gauge = proto::Gauge::default();
                gauge.set_value(value);
                sample.set_gauge(gauge);
            }
        }
        self.gathered.push(sample);
    }

    fn push_count(&mut self, labels: &[&str], count: u64) {
        self.push(labels, count as f64);
    }

    fn push_histogram(&mut self, labels: &[&str], dwell: &Histogram) {
        let mut cumulated = 0;
        let bounds = DWELL_BUCKETS.iter().zip(dwell.buckets);
        let buckets = bounds.map(|(&bound, samples)| {
            cumulated += samples;
            let mut bucket = proto::Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(cumulated);
            bucket
        });
        let mut histogram = proto::Histogram::default();
        histogram.set_bucket(buckets.collect());
        histogram.set_sample_count(dwell.count);
        histogram.set_sample_sum(dwell.sum_ns as f64 / 1e9);
        let mut sample = self.labelled(labels);
        sample.set_histogram(histogram);
        self.gathered.push(sample);
    }

    fn labelled(&self, values: &[&str]) -> proto::Metric {
        debug_assert_eq!(
            values.len(),
            self.metric.labels.len(),
            "{}",
            self.metric.name
        );
        let pairs = self
            .metric
            .labels
            .iter()
            .zip(values)
            .map(|(label, &value)| {
                let mut pair = LabelPair::default();
                pair.set_name(label.name.to_owned());
                pair.set_value(value.to_owned());
                pair
            });
        proto::Metric::from_label(pairs.collect())
    }

    fn into_family(self) -> MetricFamily {
        let mut family = MetricFamily::default();
        family.set_name(self.metric.name.to_owned());
        family.set_help(self.metric.help.to_owned());
        family.set_field_type(self.metric.kind);
        family.set_metric(self.gathered);
        family
    }
}
