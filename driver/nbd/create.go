package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"scoria/driver/block"
)

// errBadName: an export name that can't be one.
var errBadName = errors.New("bad export name")

// exportName is the name of an export as a client wrote it, taken apart.
type exportName struct {
	volume string // POOL/VOLUME, perhaps with @SNAPSHOT
	size   uint64 // bytes, from :size=; 0 without
}

// parseExportName completes a name with the default pool and takes :size= off.
func parseExportName(s string) (exportName, error) {
	n := exportName{volume: s}
	if at := strings.IndexByte(s, ':'); at >= 0 {
		option := s[at+1:]
		v, ok := strings.CutPrefix(option, "size=")
		if !ok {
			return n, fmt.Errorf("export %q: option %q: only size= is known, as in default/vm1:size=10G: %w", s, option, errBadName)
		}
		size, err := parseSize(v)
		if err != nil {
			return n, fmt.Errorf("export %q: %w: %w", s, err, errBadName)
		}
		n.volume, n.size = s[:at], size
	}
	if n.volume == "" {
		return n, fmt.Errorf("the export name is empty, must be POOL/VOLUME or VOLUME: %w", errBadName)
	}
	if !strings.Contains(n.volume, "/") {
		n.volume = "default/" + n.volume
	}
	return n, nil
}

// parseSize reads a size as qemu-img does: a decimal number, fractions allowed,
// of bytes or with a suffix k, M, G, T, P or E, powers of 1024. The result is
// rounded up to whole clusters and is at least one.
func parseSize(s string) (uint64, error) {
	bad := func(why string) (uint64, error) {
		return 0, fmt.Errorf("size %q: %s: must be a positive number with an optional suffix k, M, G, T, P or E, as in 10G", s, why)
	}
	number, shift := s, uint(0)
	if s != "" {
		if i := strings.IndexByte("BKMGTPE", s[len(s)-1]&^0x20); i >= 0 && s[len(s)-1] >= 'A' {
			number, shift = s[:len(s)-1], uint(10*i)
		}
	}
	if number == "" || len(number) > 40 || strings.Trim(number, "0123456789.") != "" {
		return bad("not a number")
	}
	r, ok := new(big.Rat).SetString(number)
	if !ok {
		return bad("not a number")
	}
	r.Mul(r, new(big.Rat).SetInt(new(big.Int).Lsh(big.NewInt(1), shift)))
	n := new(big.Int).Quo(r.Num(), r.Denom())
	switch {
	case n.Sign() <= 0:
		return bad("not positive")
	case !n.IsUint64() || n.Uint64() > math.MaxInt64-block.ClusterSize:
		return bad("too large")
	}
	return (n.Uint64() + block.ClusterSize - 1) &^ (block.ClusterSize - 1), nil
}

// open finds an export's device and its full name. If there is none and
// mayCreate is set, the volume is made in the two cases of the package doc.
func (s *Server) open(ctx context.Context, p peer, name string, mayCreate bool) (dev block.Device, volume string, err error) {
	n, err := parseExportName(name)
	if err != nil {
		return nil, "", err
	}
	dev, err = s.Opener.Open(ctx, n.volume)
	switch {
	case err == nil && dev.Info().Size < n.size:
		has := dev.Info().Size
		block.Release(dev)
		return nil, "", fmt.Errorf("volume %s exists with %d bytes, less than the %d asked for; resize it with `scoria volume resize`", n.volume, has, n.size)
	case err == nil || !errors.Is(err, block.ErrNotFound):
		return dev, n.volume, err
	}
	size, cause := n.size, "its name has size="
	if size == 0 && mayCreate && p.pid > 0 {
		size, cause = createSize(cmdline(p.pid), n.volume), "qemu-img create"
	}
	if size == 0 || !mayCreate || strings.Contains(n.volume, "@") {
		return nil, "", fmt.Errorf("%w; make it with `scoria volume create %s --size SIZE`, `qemu-img create -f raw`, or by opening %s:size=SIZE", err, n.volume, n.volume)
	}
	err = s.Opener.Create(ctx, n.volume, size)
	dev, openErr := s.Opener.Open(ctx, n.volume)
	switch {
	case err != nil && openErr == nil && dev.Info().Size >= size:
		return dev, n.volume, nil // two clients asked at once
	case err != nil:
		return nil, "", fmt.Errorf("create volume %s with %d bytes: %w", n.volume, size, err)
	}
	s.stats.created.Add(1)
	s.Log.Info().Str("volume", n.volume).Uint64("bytes", size).Int("pid", p.pid).Str("cause", cause).Msg("volume created through the helper socket")
	return dev, n.volume, openErr
}

// cmdline returns the arguments of a process, nil if they can't be read.
func cmdline(pid int) []string {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	if err != nil || len(b) == 0 || len(b) > 1<<20 {
		return nil
	}
	var args []string
	for _, a := range bytes.Split(bytes.TrimSuffix(b, []byte{0}), []byte{0}) {
		args = append(args, string(a))
	}
	return args
}

// createSize returns the size that a command line asks for if it is
// `qemu-img create` of the export volume in raw format, else 0. Options and
// their arguments are those of qemu-img(1) 7.2; what is not understood means 0.
func createSize(args []string, volume string) uint64 {
	if len(args) == 0 || filepath.Base(args[0]) != "qemu-img" {
		return 0
	}
	args = args[1:]
	// Options before the subcommand: only -T, --trace has an argument.
	for len(args) > 0 && strings.HasPrefix(args[0], "-") {
		if args[0] == "-T" || args[0] == "--trace" {
			args = args[min(1, len(args)):]
		}
		args = args[min(1, len(args)):]
	}
	if len(args) == 0 || args[0] != "create" {
		return 0
	}
	format, options, operands := createArgs(args[1:])
	if format != "raw" || len(operands) == 0 || len(operands) > 2 || !namesExport(operands[0], volume) {
		return 0
	}
	want := options["size"]
	if len(operands) == 2 {
		want = operands[1]
	}
	if want == "" {
		return 0
	}
	size, err := parseSize(want)
	if err != nil {
		return 0
	}
	return size
}

// longOptions are the long options of `qemu-img create` that have an argument,
// as short ones; -O stands for one that doesn't matter.
var longOptions = map[string]string{
	"--format": "-f", "--options": "-o", "--backing": "-b", "--backing-format": "-F", "--object": "-O",
}

// createArgs takes the arguments of `qemu-img create` apart, which getopt
// permutes: options may stand anywhere until "--".
func createArgs(args []string) (format string, options map[string]string, operands []string) {
	format, options = "raw", make(map[string]string)
	for len(args) > 0 {
		a := args[0]
		args = args[1:]
		if a == "--" {
			return format, options, append(operands, args...)
		}
		if len(a) < 2 || a[0] != '-' {
			operands = append(operands, a)
			continue
		}
		if strings.HasPrefix(a, "--") {
			// Later versions of qemu-img have long names for the short options.
			long, value, joined := strings.Cut(a, "=")
			short, known := longOptions[long]
			switch {
			case !known:
				continue
			case !joined && len(args) == 0:
				return "", nil, nil
			case !joined:
				value, args = args[0], args[1:]
			}
			a = short + value
		}
		for flags := a[1:]; flags != ""; flags = flags[1:] {
			if !strings.Contains("fobFO", flags[:1]) {
				continue // -q and -u have no argument
			}
			value := flags[1:]
			if value == "" {
				if len(args) == 0 {
					return "", nil, nil
				}
				value, args = args[0], args[1:]
			}
			switch flags[0] {
			case 'f':
				format = value
			case 'o':
				for _, kv := range strings.Split(value, ",") {
					k, v, _ := strings.Cut(kv, "=")
					options[k] = v
				}
			}
			break
		}
	}
	return format, options, operands
}

// namesExport says whether a file name of QEMU's means an export of an NBD
// server that is called volume: nbd+unix:///VOLUME?socket=… or
// nbd:unix:…:exportname=VOLUME.
func namesExport(file, volume string) bool {
	var name string
	if _, after, ok := strings.Cut(file, ":exportname="); ok && strings.HasPrefix(file, "nbd:") {
		name = after
	} else {
		u, err := url.Parse(file)
		if err != nil || u.Scheme != "nbd+unix" {
			return false
		}
		name = strings.TrimPrefix(u.Path, "/")
	}
	n, err := parseExportName(name)
	return err == nil && n.volume == volume
}
