package host

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/pelletier/go-toml/v2"
	"github.com/rs/zerolog"

	"scoria/driver"
	"scoria/driver/cache"
	"scoria/driver/control"
	"scoria/shm"
)

// DefaultConfigFile is where scoriad looks for its configuration.
const DefaultConfigFile = "/etc/scoria/scoria.toml"

// Size is a number of bytes, written as a power of two: 64M = 64MiB = 67108864.
type Size uint64

// ParseSize reads a size as the CLI and the configuration file write it.
func ParseSize(s string) (Size, error) {
	n, err := units.RAMInBytes(strings.TrimSpace(s))
	if err != nil || n < 0 || n == math.MaxInt64 {
		return 0, fmt.Errorf("size %q: must be a number of bytes, or one with K, M, G or T (powers of 1024), such as 512M or 10G", s)
	}
	return Size(n), nil
}

// String writes the size so that ParseSize reads the same: with the largest
// unit that divides it.
func (s Size) String() string {
	if s == 0 {
		return "0"
	}
	for _, u := range []struct {
		shift uint
		name  string
	}{{40, "TiB"}, {30, "GiB"}, {20, "MiB"}, {10, "KiB"}} {
		if s%(1<<u.shift) == 0 {
			return strconv.FormatUint(uint64(s>>u.shift), 10) + u.name
		}
	}
	return strconv.FormatUint(uint64(s), 10)
}

// MarshalText implements encoding.TextMarshaler.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Size) UnmarshalText(b []byte) (err error) {
	*s, err = ParseSize(string(b))
	return err
}

// Duration is a time.Duration written as "50us" or "1m30s".
type Duration time.Duration

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) {
	return []byte(strings.Replace(time.Duration(d).String(), "µs", "us", 1)), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("duration %q: must be a number with ns, us, ms, s, m or h, such as 50us", b)
	}
	*d = Duration(v)
	return nil
}

// Mode is a file mode written in octal: "0660".
type Mode fs.FileMode

// MarshalText implements encoding.TextMarshaler.
func (m Mode) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "%04o", uint32(m)), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *Mode) UnmarshalText(b []byte) error {
	v, err := strconv.ParseUint(string(b), 8, 32)
	if err != nil || v > 0o777 {
		return fmt.Errorf("mode %q: must be octal permissions up to 0777, such as 0660", b)
	}
	*m = Mode(v)
	return nil
}

var (
	_ encoding.TextUnmarshaler = (*Size)(nil)
	_ encoding.TextUnmarshaler = (*Duration)(nil)
	_ encoding.TextUnmarshaler = (*Mode)(nil)
)

// Config is the configuration file. The comments are part of the file that
// `scoriad --print-config` writes.
type Config struct {
	DataDir string `toml:"data_dir" comment:"Volumes, registry and embedded store. One daemon per directory."`
	RunDir  string `toml:"run_dir" comment:"Sockets: control.sock, nbd.sock, shm.sock, vhost/POOL/VOLUME.sock."`

	Log         LogConfig         `toml:"log"`
	Metrics     MetricsConfig     `toml:"metrics"`
	Sockets     SocketsConfig     `toml:"sockets"`
	WriteBuffer WriteBufferConfig `toml:"write_buffer"`
	Cache       CacheConfig       `toml:"cache"`
	Vhost       VhostConfig       `toml:"vhost"`
	NBD         NBDConfig         `toml:"nbd"`
	Shm         ShmConfig         `toml:"shm"`
	Pool        PoolConfig        `toml:"pool"`
	Backend     BackendConfig     `toml:"backend"`
}

// LogConfig is section [log].
type LogConfig struct {
	Level  string `toml:"level" comment:"trace, debug, info, warn or error."`
	Format string `toml:"format" comment:"auto (console on a terminal, else json), json or console."`
}

// MetricsConfig is section [metrics].
type MetricsConfig struct {
	Address string `toml:"address" comment:"host:port of a Prometheus endpoint (/metrics); empty: none. The control socket\nalways has one."`
}

// SocketsConfig is section [sockets].
type SocketsConfig struct {
	Mode  Mode   `toml:"mode" comment:"Permissions of all sockets."`
	Group string `toml:"group" comment:"Group of all sockets, name or number, for instance that of QEMU; empty: the daemon's."`
}

// WriteBufferConfig is section [write_buffer].
type WriteBufferConfig struct {
	Size Size   `toml:"size" comment:"Memory for the heads of all volumes' logs, in a tmpfs file that outlives the daemon.\n0: a sixteenth of the RAM, at least 64 MiB, at most 1 GiB."`
	Dir  string `toml:"dir" comment:"A directory on tmpfs for that file; empty: run_dir if it is on tmpfs, else /dev/shm."`
}

// CacheConfig is section [cache].
type CacheConfig struct {
	Local   Size `toml:"local" comment:"Disk space under data_dir for local copies of data that is in the store already."`
	Read    Size `toml:"read" comment:"Memory for data read back from disk or store."`
	SSD     Size `toml:"ssd" comment:"A second tier behind that memory, in a file under data_dir; 0: none."`
	Reserve Size `toml:"reserve" comment:"Disk space that is left for what gives room back: writers pause that many bytes\nbefore the disk is full."`
}

// VhostConfig is section [vhost].
type VhostConfig struct {
	Workers   int      `toml:"workers" comment:"Threads that serve the queues of all guests; 0: half the CPUs, at least 1, at most 8."`
	Poll      Duration `toml:"poll" comment:"How long a queue is polled after its last request before its thread sleeps.\nMore costs CPU and lowers latency; 0s never polls."`
	PollShare float64  `toml:"poll_share" comment:"Share of its time, 0 to 1, that each thread may spend polling in vain; 1 is no limit."`
}

// NBDConfig is section [nbd].
type NBDConfig struct {
	Enabled bool `toml:"enabled" comment:"Serve all volumes to qemu-img and other tools on run_dir/nbd.sock."`
}

// PoolConfig is section [pool].
type PoolConfig struct {
	BlockSize uint32 `toml:"block_size" comment:"Logical block of new pools' volumes in bytes: 512 boots everywhere, or 4096."`
	SCOSize   Size   `toml:"sco_size" comment:"Size of the objects that new pools' volumes are stored in: 1M to 1G."`
	Store     string `toml:"store" comment:"Where volumes of new pools are kept, if nothing else is said: \"objects\", on storage\ndaemons (if there is none yet, one is made in data_dir/asd), or \"directory\", as files\nbelow data_dir/store. A pool keeps its kind of store for good."`
}

// DefaultConfig is what an empty file means.
func DefaultConfig() Config {
	return Config{
		DataDir: "/var/lib/scoria",
		RunDir:  "/run/scoria",
		Log:     LogConfig{Level: "info", Format: "auto"},
		Sockets: SocketsConfig{Mode: 0o660},
		Cache:   CacheConfig{Local: 10 << 30, Read: 64 << 20, Reserve: 256 << 20},
		Vhost:   VhostConfig{Poll: Duration(50 * time.Microsecond), PollShare: 1},
		NBD:     NBDConfig{Enabled: true},
		Shm:     ShmConfig{Enabled: true, Memory: shm.DefaultMemoryBytes, Connections: shm.DefaultMaxConnections, Access: []ShmAccess{}},
		Pool:    PoolConfig{BlockSize: 512, SCOSize: driver.DefaultSCOBytes, Store: control.StoreObjects},
		Backend: BackendConfig{RepairAfter: Duration(10 * time.Minute), RepairLatency: Duration(10 * time.Millisecond)},
	}
}

// LoadConfig reads a configuration file over the defaults. Errors name the file
// and the line.
func LoadConfig(name string) (Config, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return Config{}, fmt.Errorf("configuration: %w", err)
	}
	return parseConfig(name, b)
}

func parseConfig(name string, b []byte) (Config, error) {
	c := DefaultConfig()
	d := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields()
	err := d.Decode(&c)
	var unknown *toml.StrictMissingError
	var wrong *toml.DecodeError
	switch {
	case errors.As(err, &unknown):
		var lines []string
		for i := range unknown.Errors {
			e := &unknown.Errors[i]
			row, _ := e.Position()
			lines = append(lines, fmt.Sprintf("%s line %d: unknown key %q; `scoriad --print-config` lists all", name, row, strings.Join(e.Key(), ".")))
		}
		return c, fmt.Errorf("configuration: %s", strings.Join(lines, "\n"))
	case errors.As(err, &wrong):
		row, _ := wrong.Position()
		return c, fmt.Errorf("configuration: %s line %d: %w", name, row, err)
	case err != nil:
		return c, fmt.Errorf("configuration: %s: %w", name, err)
	}
	if err := c.Validate(); err != nil {
		return c, fmt.Errorf("configuration: %s: %w", name, err)
	}
	return c, nil
}

// PrintConfig returns a configuration file with every key, its comment and c's value.
func PrintConfig(c Config) ([]byte, error) {
	var b bytes.Buffer
	b.WriteString("# Configuration of scoriad. Every key is optional and shown with its default.\n" +
		"# Sizes take K, M, G and T (powers of 1024), durations ns, us, ms, s, m and h.\n\n")
	if err := toml.NewEncoder(&b).SetIndentTables(false).Encode(c); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// Validate names the first key that is wrong and what would be right.
func (c *Config) Validate() error {
	if _, err := zerolog.ParseLevel(c.Log.Level); err != nil || c.Log.Level == "" {
		return fmt.Errorf("log.level %q: must be trace, debug, info, warn or error", c.Log.Level)
	}
	if _, _, err := net.SplitHostPort(c.Metrics.Address); c.Metrics.Address != "" && err != nil {
		return fmt.Errorf("metrics.address %q: must be host:port, such as 127.0.0.1:9710", c.Metrics.Address)
	}
	if _, err := c.Sockets.gid(); err != nil {
		return err
	}
	if err := c.Shm.validate(); err != nil {
		return err
	}
	if err := c.Backend.validate(); err != nil {
		return err
	}
	switch {
	case !filepath.IsAbs(c.DataDir):
		return fmt.Errorf("data_dir %q: must be an absolute path", c.DataDir)
	case !filepath.IsAbs(c.RunDir):
		return fmt.Errorf("run_dir %q: must be an absolute path", c.RunDir)
	case len(c.RunDir) > maxRunDir:
		// Of the 107 bytes of a socket's path, this leaves some for volumes' names.
		return fmt.Errorf("run_dir %q: has %d characters; at most %d fit into a socket's path", c.RunDir, len(c.RunDir), maxRunDir)
	case c.Log.Format != "auto" && c.Log.Format != "json" && c.Log.Format != "console":
		return fmt.Errorf("log.format %q: must be auto, json or console", c.Log.Format)
	case c.WriteBuffer.Size != 0 && (c.WriteBuffer.Size < minWriteBuffer || c.WriteBuffer.Size > 1<<40):
		return fmt.Errorf("write_buffer.size %s: must be 0 or from %s to 1TiB", c.WriteBuffer.Size, Size(minWriteBuffer))
	case c.WriteBuffer.Dir != "" && !filepath.IsAbs(c.WriteBuffer.Dir):
		return fmt.Errorf("write_buffer.dir %q: must be an absolute path or empty", c.WriteBuffer.Dir)
	case c.Vhost.Workers < 0 || c.Vhost.Workers > 256:
		return fmt.Errorf("vhost.workers %d: must be from 0 to 256", c.Vhost.Workers)
	case c.Vhost.Poll < 0 || c.Vhost.Poll > Duration(time.Second):
		return fmt.Errorf("vhost.poll %s: must be from 0s to 1s", time.Duration(c.Vhost.Poll))
	case c.Vhost.PollShare < 0 || c.Vhost.PollShare > 1 || math.IsNaN(c.Vhost.PollShare):
		return fmt.Errorf("vhost.poll_share %v: must be from 0 to 1", c.Vhost.PollShare)
	case c.Pool.BlockSize != 512 && c.Pool.BlockSize != 4096:
		return fmt.Errorf("pool.block_size %d: must be 512 or 4096", c.Pool.BlockSize)
	case c.Pool.SCOSize < driver.MinSCOBytes || c.Pool.SCOSize > driver.MaxSCOBytes || c.Pool.SCOSize%driver.MinSCOBytes != 0:
		return fmt.Errorf("pool.sco_size %s: must be a multiple of 1M from 1M to 1G", c.Pool.SCOSize)
	case c.Pool.Store != control.StoreObjects && c.Pool.Store != control.StoreDirectory:
		return fmt.Errorf("pool.store %q: must be %s or %s", c.Pool.Store, control.StoreObjects, control.StoreDirectory)
	case c.Cache.Local > math.MaxInt64 || c.Cache.Read > 1<<40:
		return fmt.Errorf("cache.read %s: must be at most 1TiB", c.Cache.Read)
	case c.Cache.SSD != 0 && c.Cache.SSD < cache.MinSSDBytes || c.Cache.SSD > 1<<42:
		return fmt.Errorf("cache.ssd %s: must be 0 or from %s to 4TiB", c.Cache.SSD, Size(cache.MinSSDBytes))
	case c.Cache.Reserve > 1<<40:
		return fmt.Errorf("cache.reserve %s: must be at most 1TiB", c.Cache.Reserve)
	}
	return nil
}

// Resolve makes the directories absolute and validates the configuration.
func (c *Config) Resolve() error {
	for _, dir := range []*string{&c.DataDir, &c.RunDir} {
		abs, err := filepath.Abs(*dir)
		if err != nil {
			return err
		}
		*dir = abs
	}
	return c.Validate()
}

const (
	maxRunDir      = 80
	minWriteBuffer = 64 << 20
	maxWriteBuffer = 1 << 30 // of the default
)

// gid resolves the group; -1 leaves the daemon's.
func (s *SocketsConfig) gid() (int, error) {
	if s.Group == "" {
		return -1, nil
	}
	if n, err := strconv.ParseUint(s.Group, 10, 31); err == nil {
		return int(n), nil
	}
	g, err := user.LookupGroup(s.Group)
	if err != nil {
		return 0, fmt.Errorf("sockets.group %q: no such group: must be a group's name or number, or empty", s.Group)
	}
	return strconv.Atoi(g.Gid)
}

func (c *Config) controlSocket() string { return filepath.Join(c.RunDir, "control.sock") }

func (c *Config) shmSocket() string { return filepath.Join(c.RunDir, "shm.sock") }

func (c *Config) nbdSocket() string { return filepath.Join(c.RunDir, "nbd.sock") }

func (c *Config) vhostSocket(pool, name string) string {
	return filepath.Join(c.RunDir, "vhost", pool, name+".sock")
}
