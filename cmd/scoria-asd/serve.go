package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/rs/zerolog"

	"scoria/alba/asd/disk"
	"scoria/alba/asd/remote"
	"scoria/alba/vfs"
)

// run serves until a signal ends it.
func run(f *flags) error {
	log, err := f.logger()
	if err != nil {
		return err
	}
	opts, err := f.options(log)
	if err != nil {
		return err
	}
	terminate := make(chan os.Signal, 1)
	signal.Notify(terminate, syscall.SIGTERM, syscall.SIGINT)
	signal.Ignore(syscall.SIGHUP)
	// The address first: what is wrong with it should not wait for a recovery.
	ln, err := remote.Listen(f.listen, f.security)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	defer ln.Close()
	d, err := disk.Supervise(vfs.OS(), f.dataDir, opts)
	if err != nil {
		return err
	}
	return errors.Join(serve(f, log, d, ln, terminate), d.Close())
}

func serve(f *flags, log zerolog.Logger, d *disk.Supervised, ln net.Listener, terminate <-chan os.Signal) error {
	server, err := remote.NewServer(d, remote.ServerOptions{Log: log})
	if err != nil {
		return err
	}
	failed := make(chan error, 2)
	if f.metrics != "" {
		m, err := serveMetrics(f.metrics, d, server, failed)
		if err != nil {
			return err
		}
		defer m.Close()
	}
	go func() { failed <- server.Serve(ln) }()
	log.Info().Str("version", version).Int("pid", os.Getpid()).Str("data_dir", f.dataDir).Str("id", d.ID()).
		Stringer("listen", ln.Addr()).Msg("scoria-asd is ready")
	notify(log, "READY=1")
	select {
	case s := <-terminate:
		log.Info().Stringer("signal", s).Msg("asked to stop")
	case err = <-failed:
	}
	notify(log, "STOPPING=1")
	if err = errors.Join(err, server.Close()); err == nil {
		log.Info().Msg("scoria-asd has stopped")
	}
	return err
}

// notify tells systemd, if it started us, how we are.
func notify(log zerolog.Logger, state string) {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err == nil {
		_, err = c.Write([]byte(state))
		_ = c.Close()
	}
	if err != nil {
		log.Warn().Err(err).Msg("systemd was not told")
	}
}

func serveMetrics(addr string, d *disk.Supervised, s *remote.Server, failed chan<- error) (*http.Server, error) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(&collector{disk: d, server: s}, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("--metrics-listen: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	m := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		if err := m.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			failed <- fmt.Errorf("metrics: %w", err)
		}
	}()
	return m, nil
}

// collector turns the ASD's statistics into metrics.
type collector struct {
	disk   *disk.Supervised
	server *remote.Server
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("scoria_asd_"+name, help, labels, nil)
}

var (
	infoDesc     = desc("info", "Always 1.", "id", "version")
	capacityDesc = desc("capacity_bytes", "What the ASD may fill.")
	usedDesc     = desc("used_bytes", "What values and key-value store take.")
	valuesDesc   = desc("value_bytes", "Sum of the values' sizes.")
	keysDesc     = desc("keys", "Number of keys.")
	fullDesc     = desc("full", "1 if puts are refused for want of room.")
	failedDesc   = desc("failed", "1 if a sync failed: no writes until the disk is opened anew.")
	reopenedDesc = desc("reopened_total", "How often the disk was opened anew after it had failed.")
	damagedDesc  = desc("damaged", "1 if the key-value store is damaged: replace the disk.")
	connsDesc    = desc("connections", "Connections of clients.")
	queueDesc    = desc("requests_waiting", "Requests that use the disk or wait for it.", "priority")
	getsDesc     = desc("gets_total", "Values read, whole or in part.")
	appliesDesc  = desc("applies_total", "Applies done.")
	refusedDesc  = desc("applies_refused_total", "Applies refused.")
	commitsDesc  = desc("commits_total", "Group commits.")
	readDesc     = desc("read_bytes_total", "Bytes that readers asked for.")
	diskReadDesc = desc("disk_read_bytes_total", "Bytes read from value files, with their heads.")
	writtenDesc  = desc("written_bytes_total", "Bytes of values put.")
	corruptDesc  = desc("corrupt_blocks_total", "Blocks that failed their checksum.")
)

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{infoDesc, capacityDesc, usedDesc, valuesDesc, keysDesc, fullDesc, failedDesc, damagedDesc, connsDesc,
		queueDesc, getsDesc, appliesDesc, refusedDesc, commitsDesc, readDesc, diskReadDesc, writtenDesc, corruptDesc, reopenedDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	s, err := c.disk.Stats(context.Background())
	if err != nil {
		ch <- prometheus.NewInvalidMetric(infoDesc, err)
		return
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	flag := func(d *prometheus.Desc, v bool) {
		if v {
			gauge(d, 1)
		} else {
			gauge(d, 0)
		}
	}
	counter := func(d *prometheus.Desc, v uint64) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v))
	}
	gauge(infoDesc, 1, s.ID, s.Version)
	gauge(capacityDesc, float64(s.Capacity))
	gauge(usedDesc, float64(s.Used))
	gauge(valuesDesc, float64(s.Bytes))
	gauge(keysDesc, float64(s.Keys))
	gauge(connsDesc, float64(c.server.Connections()))
	gauge(queueDesc, float64(s.QueuedGuest), "guest")
	gauge(queueDesc, float64(s.QueuedRepair), "repair")
	flag(fullDesc, s.Full)
	flag(failedDesc, s.Failed != "")
	flag(damagedDesc, s.Damaged != "")
	counter(getsDesc, s.Gets)
	counter(appliesDesc, s.Applies)
	counter(refusedDesc, s.Refused)
	counter(commitsDesc, s.Commits)
	counter(readDesc, s.ReadBytes)
	counter(diskReadDesc, s.DiskReadBytes)
	counter(writtenDesc, s.WrittenBytes)
	counter(corruptDesc, s.CorruptBlocks)
	counter(reopenedDesc, s.Reopened)
}
