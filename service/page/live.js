// p50, p95 and throughput of the last minute, from the histogram of request durations in /metrics.

const NAME = "dsformer_request_duration_seconds_bucket";
const URL = `/metrics?name[]=${NAME}`;
const LABEL = /(\w+)="([^"]*)"/g;
export const EVERY_SECONDS = 2;
const WINDOW_SECONDS = 60;

/** Prometheus text -> Map from "task variant" to [upper edge, requests up to it] in rising order. */
export function parse(text) {
  const histograms = new Map();
  for (const line of text.split("\n")) {
    if (!line.startsWith(NAME)) continue;
    const labels = Object.fromEntries([...line.matchAll(LABEL)].map(([, name, value]) => [name, value]));
    const key = `${labels.task} ${labels.variant}`;
    if (!histograms.has(key)) histograms.set(key, []);
    histograms.get(key).push([labels.le === "+Inf" ? Infinity : Number(labels.le), Number(line.split(" ").at(-1))]);
  }
  return histograms;
}

/** The quantile as Prometheus reads it: straight lines between the edges of buckets. */
export function quantile(buckets, share) {
  const rank = share * buckets.at(-1)[1];
  const found = buckets.findIndex(([, count]) => count >= rank && count > 0);
  const [edge, count] = buckets[found];
  const [low, below] = found ? buckets[found - 1] : [0, 0];
  return edge === Infinity ? low : low + ((edge - low) * (rank - below)) / (count - below);
}

/** Readings of one minute; the newest less the oldest is what came in between. */
export class Live {
  constructor() {
    this.readings = [];
  }

  async read(headers) {
    const response = await fetch(URL, { headers });
    if (!response.ok) throw new Error(`status ${response.status}`);
    this.add(parse(await response.text()), performance.now() / 1000);
  }

  add(histograms, now) {
    const last = this.readings.at(-1)?.histograms;
    const countOf = (buckets) => buckets?.at(-1)[1] ?? 0;
    // A service that was started anew counts from 0 again.
    if (last && [...last].some(([key, buckets]) => countOf(histograms.get(key)) < countOf(buckets))) this.readings = [];
    this.readings.push({ histograms, now });
    while (now - this.readings[0].now > WINDOW_SECONDS + EVERY_SECONDS / 2) this.readings.shift();
  }

  /** { p50, p95, perSecond } of one model, in seconds; the first two null where no request came. */
  of(task, variant) {
    const key = `${task} ${variant}`;
    const [oldest, newest] = [this.readings[0], this.readings.at(-1)];
    const after = newest?.histograms.get(key);
    const before = oldest?.histograms.get(key);
    if (!after) return { p50: null, p95: null, perSecond: 0 };
    // A model that was loaded meanwhile began at 0.
    const buckets = after.map(([edge, count], i) => [edge, count - (before?.[i][1] ?? 0)]);
    const requests = buckets.at(-1)[1];
    if (!requests) return { p50: null, p95: null, perSecond: 0 };
    return {
      p50: quantile(buckets, 0.5),
      p95: quantile(buckets, 0.95),
      perSecond: requests / Math.max(newest.now - oldest.now, EVERY_SECONDS),
    };
  }
}
