//! Curves as SVG, both axes logarithmic.

use std::fmt::Write;

pub(super) struct Curve {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

pub(super) struct Plot {
    pub title: String,
    pub x: &'static str,
    pub curves: Vec<Curve>,
}

const COLORS: [&str; 8] = ["#1b6ca8", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#3d5a80", "#e07a5f", "#5f6b6d"];
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 360.0;
/// Room for labels: left, right, above, below.
const MARGIN: [f64; 4] = [60.0, 150.0, 40.0, 40.0];

impl Plot {
    /// Plots below one another.
    pub fn stack(plots: &[Self]) -> String {
        let height = HEIGHT * plots.len() as f64;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
        );
        for (i, plot) in plots.iter().enumerate() {
            let _ = writeln!(svg, "<g transform=\"translate(0 {})\">", HEIGHT * i as f64);
            plot.draw(&mut svg);
            svg.push_str("</g>\n");
        }
        svg + "</svg>\n"
    }

    fn draw(&self, svg: &mut String) {
        let all = || self.curves.iter().flat_map(|c| &c.points).filter(|(x, y)| *x > 0.0 && *y > 0.0);
        let range = |of: fn(&(f64, f64)) -> f64| {
            let (lo, hi) = all().map(of).fold((f64::INFINITY, 0f64), |(lo, hi), v| (lo.min(v), hi.max(v)));
            // a power of two around what there is
            (lo.log2().floor(), hi.log2().ceil().max(lo.log2().floor() + 1.0))
        };
        let _ = writeln!(svg, "<text x=\"{}\" y=\"22\" font-size=\"14\">{}</text>", MARGIN[0], self.title);
        if all().next().is_none() {
            return;
        }
        let ((x0, x1), (y0, y1)) = (range(|p| p.0), range(|p| p.1));
        let (width, height) = (WIDTH - MARGIN[0] - MARGIN[1], HEIGHT - MARGIN[2] - MARGIN[3]);
        let px = |x: f64| MARGIN[0] + (x.log2() - x0) / (x1 - x0) * width;
        let py = |y: f64| MARGIN[2] + height - (y.log2() - y0) / (y1 - y0) * height;
        for e in x0 as i32..=x1 as i32 {
            let (v, at) = (2f64.powi(e), px(2f64.powi(e)));
            let (top, bottom) = (MARGIN[2], MARGIN[2] + height);
            let _ = writeln!(svg, "<path d=\"M{at:.1} {top}V{bottom}\" stroke=\"#ddd\"/>");
            let _ = writeln!(svg, "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{v}</text>", bottom + 18.0);
        }
        for e in y0 as i32..=y1 as i32 {
            let (v, at) = (2f64.powi(e), py(2f64.powi(e)));
            let (left, right) = (MARGIN[0], MARGIN[0] + width);
            let _ = writeln!(svg, "<path d=\"M{left} {at:.1}H{right}\" stroke=\"#ddd\"/>");
            let _ = writeln!(svg, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{v}</text>", left - 6.0, at + 4.0);
        }
        let _ =
            writeln!(svg, "<text x=\"{}\" y=\"{}\">{}</text>", MARGIN[0] + width + 8.0, MARGIN[2] + height + 18.0, self.x);
        for (i, c) in self.curves.iter().enumerate() {
            let color = COLORS[i % COLORS.len()];
            let points: Vec<String> = c.points.iter().map(|(x, y)| format!("{:.1},{:.1}", px(*x), py(*y))).collect();
            let _ = writeln!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"2\"/>",
                points.join(" ")
            );
            for p in &points {
                let (x, y) = p.split_once(',').unwrap_or_default();
                let _ = writeln!(svg, "<circle cx=\"{x}\" cy=\"{y}\" r=\"3\" fill=\"{color}\"/>");
            }
            let (x, y) = (MARGIN[0] + width + 14.0, MARGIN[2] + 14.0 * i as f64 + 10.0);
            let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\" fill=\"{color}\">{}</text>", c.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_has_a_line_a_curve_and_stays_inside() {
        let curve = |name: &str, k: f64| Curve {
            name: name.into(),
            points: (10..15).map(|e| (2f64.powi(e), k * e as f64)).collect(),
        };
        let plot = |curves| Plot { title: "t".into(), x: "N", curves };
        let svg = Plot::stack(&[plot(vec![curve("a", 1.0), curve("b", 30.0)]), plot(vec![])]);
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert_eq!(svg.matches("<circle").count(), 10);
        for at in svg.split("cx=\"").skip(1) {
            let x: f64 = at.split('"').next().unwrap().parse().unwrap();
            assert!((MARGIN[0]..=WIDTH - MARGIN[1]).contains(&x), "{x}");
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }
}
