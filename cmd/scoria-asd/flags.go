package main

import (
	"fmt"
	"io"
	"os"

	"github.com/docker/go-units"
	"github.com/rs/zerolog"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"scoria/alba/asd/disk"
	"scoria/alba/asd/remote"
)

// flags are the settings of all subcommands.
type flags struct {
	dataDir, id              string
	capacity, reserve, cache string
	logLevel, logFormat      string

	listen, metrics string
	security        remote.Security
}

// disk adds the flags about the directory and the log.
func (f *flags) disk(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.dataDir, "data-dir", "", "directory of the ASD (required)")
	fl.StringVar(&f.id, "id", "", "id that the ASD in the directory must have")
	fl.StringVar(&f.logLevel, "log-level", "info", "trace, debug, info, warn or error")
	fl.StringVar(&f.logFormat, "log-format", "auto", "json, console, or auto: console on a terminal")
	fl.StringVar(&f.cache, "cache", "32M", "memory for the key-value store's blocks")
	if err := cmd.MarkFlagRequired("data-dir"); err != nil {
		panic(err) // the flag was defined above
	}
}

// serve adds the flags of the daemon.
func (f *flags) serve(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.listen, "listen", "127.0.0.1:9711", "HOST:PORT to serve on")
	fl.StringVar(&f.capacity, "capacity", "", "what the ASD may fill, such as 2T; all of the file system if not given")
	fl.StringVar(&f.reserve, "reserve", "", "what is not for values but for deleting and compacting; a 64th of the capacity, from 64M to 4G, if not given")
	fl.StringVar(&f.metrics, "metrics-listen", "", "HOST:PORT of a Prometheus endpoint (/metrics); none if not given")
	fl.StringVar(&f.security.CertFile, "tls-cert", "", "PEM file with the certificate of this ASD")
	fl.StringVar(&f.security.KeyFile, "tls-key", "", "PEM file with its key")
	fl.StringVar(&f.security.CAFile, "tls-ca", "", "PEM file with the CA of the certificates of clients")
	fl.StringVar(&f.security.AllowPlaintext, "allow-plaintext", "", "'"+remote.PlaintextWords+"' lets it listen beyond loopback without TLS")
}

// size reads a flag with a number of bytes; 0 if it isn't given.
func size(name, value string) (int64, error) {
	if value == "" {
		return 0, nil
	}
	n, err := units.RAMInBytes(value)
	if err == nil && n <= 0 {
		err = fmt.Errorf("must be more than 0")
	}
	if err != nil {
		return 0, fmt.Errorf("--%s %q: %w, want a size such as 500M or 2T", name, value, err)
	}
	return n, nil
}

// options returns the engine's settings.
func (f *flags) options(log zerolog.Logger) (disk.Options, error) {
	o := disk.Options{ID: f.id, Version: version, Log: log}
	var err error
	for _, s := range []struct {
		name, value string
		to          *int64
	}{{"capacity", f.capacity, &o.CapacityBytes}, {"reserve", f.reserve, &o.ReserveBytes}, {"cache", f.cache, &o.CacheBytes}} {
		if *s.to, err = size(s.name, s.value); err != nil {
			return o, err
		}
	}
	return o, nil
}

func (f *flags) logger() (zerolog.Logger, error) {
	level, err := zerolog.ParseLevel(f.logLevel)
	if err != nil || f.logLevel == "" {
		return zerolog.Nop(), fmt.Errorf("--log-level %q: want trace, debug, info, warn or error", f.logLevel)
	}
	zerolog.TimeFieldFormat = "2006-01-02T15:04:05.000Z07:00"
	zerolog.DurationFieldUnit = 1e6 // milliseconds
	var w io.Writer = os.Stderr
	_, notTerminal := unix.IoctlGetTermios(int(os.Stderr.Fd()), unix.TCGETS)
	switch f.logFormat {
	case "json":
	case "console", "auto":
		if f.logFormat == "console" || notTerminal == nil {
			w = zerolog.ConsoleWriter{Out: os.Stderr, TimeFormat: "15:04:05.000", NoColor: notTerminal != nil}
		}
	default:
		return zerolog.Nop(), fmt.Errorf("--log-format %q: want json, console or auto", f.logFormat)
	}
	return zerolog.New(zerolog.SyncWriter(w)).Level(level).With().Timestamp().Logger(), nil
}
