package alba

import (
	"errors"
	"fmt"
	"strings"
)

// ErrPreset: a preset breaks a rule; the text says which.
var ErrPreset = errors.New("invalid preset")

// Policy says how an object is spread. The first policy of a preset for which the
// live devices can take c fragments is used.
type Policy struct {
	K int `json:"k"` // data fragments
	M int `json:"m"` // parity fragments: so many devices may be lost
	C int `json:"c"` // fragments that must be durable before an upload is acknowledged
	X int `json:"x"` // fragments of one chunk at most in one failure domain
}

func (p Policy) String() string { return fmt.Sprintf("(%d, %d, %d, %d)", p.K, p.M, p.C, p.X) }

// Shards is k+m.
func (p Policy) Shards() int { return p.K + p.M }

// Domain is what may fail as one.
type Domain uint8

// Domains, from small to large. Each contains the one before it.
const (
	DomainDisk Domain = iota
	DomainHost
	DomainRack
	DomainDatacentre
	domainCount
)

var domainNames = [domainCount]string{"disk", "host", "rack", "datacentre"}

func (d Domain) String() string { return name(domainNames[:], int(d)) }

// MarshalText implements encoding.TextMarshaler.
func (d Domain) MarshalText() ([]byte, error) { return marshalName(domainNames[:], int(d)) }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Domain) UnmarshalText(b []byte) error {
	n, err := unmarshalName("failure domain", domainNames[:], string(b))
	*d = Domain(n)
	return err
}

// Compression of each block of an object.
type Compression uint8

// Kinds of compression.
const (
	CompressNone Compression = iota
	CompressLZ4
	CompressZstd
	compressionCount
)

var compressionNames = [compressionCount]string{"none", "lz4", "zstd"}

func (c Compression) String() string { return name(compressionNames[:], int(c)) }

// MarshalText implements encoding.TextMarshaler.
func (c Compression) MarshalText() ([]byte, error) { return marshalName(compressionNames[:], int(c)) }

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *Compression) UnmarshalText(b []byte) error {
	n, err := unmarshalName("compression", compressionNames[:], string(b))
	*c = Compression(n)
	return err
}

// Encryption of each block of an object.
type Encryption uint8

// Kinds of encryption.
const (
	EncryptNone Encryption = iota
	EncryptAES256GCM
	encryptionCount
)

var encryptionNames = [encryptionCount]string{"none", "aes-256-gcm"}

func (e Encryption) String() string { return name(encryptionNames[:], int(e)) }

// MarshalText implements encoding.TextMarshaler.
func (e Encryption) MarshalText() ([]byte, error) { return marshalName(encryptionNames[:], int(e)) }

// UnmarshalText implements encoding.TextUnmarshaler.
func (e *Encryption) UnmarshalText(b []byte) error {
	n, err := unmarshalName("encryption", encryptionNames[:], string(b))
	*e = Encryption(n)
	return err
}

func name(names []string, i int) string {
	if i < len(names) {
		return names[i]
	}
	return fmt.Sprintf("unknown(%d)", i)
}

func marshalName(names []string, i int) ([]byte, error) {
	if i >= len(names) {
		return nil, fmt.Errorf("value %d: must be below %d", i, len(names))
	}
	return []byte(names[i]), nil
}

func unmarshalName(what string, names []string, s string) (int, error) {
	for i, n := range names {
		if n == s {
			return i, nil
		}
	}
	return 0, fmt.Errorf("%s %q: must be one of %s", what, s, strings.Join(names, ", "))
}

// Preset is a named set of rules for storing objects.
type Preset struct {
	Version       int         `json:"version"`
	Name          string      `json:"name"`
	Policies      []Policy    `json:"policies"`       // in order of preference
	FragmentBytes int         `json:"fragment_bytes"` // aimed at; an object's are up to a quarter larger
	Domain        Domain      `json:"failure_domain"` // what x counts
	Compression   Compression `json:"compression"`
	Encryption    Encryption  `json:"encryption"`
}

// Limits of presets.
const (
	MaxPolicies      = 8
	MaxK             = 64
	MaxM             = 32
	MinFragmentBytes = 64 << 10
	MaxFragmentBytes = 4 << 20
	DefaultFragment  = 4 << 20
)

// Check returns ErrPreset with the rule that the preset breaks, or nil.
func (p *Preset) Check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("preset %q: %s: %w", p.Name, fmt.Sprintf(format, args...), ErrPreset)
	}
	if err := checkPresetName(p.Name); err != nil {
		return bad("%v", err)
	}
	switch {
	case len(p.Policies) == 0 || len(p.Policies) > MaxPolicies:
		return bad("%d policies: must have 1 to %d", len(p.Policies), MaxPolicies)
	case p.FragmentBytes < MinFragmentBytes || p.FragmentBytes > MaxFragmentBytes || p.FragmentBytes%BlockSize != 0:
		return bad("fragment size %d: must be a multiple of %d from %d to %d bytes", p.FragmentBytes, BlockSize, MinFragmentBytes, MaxFragmentBytes)
	case p.Domain >= domainCount:
		return bad("failure domain %d: must be disk, host, rack or datacentre", p.Domain)
	case p.Compression >= compressionCount:
		return bad("compression %d: must be none, lz4 or zstd", p.Compression)
	case p.Encryption >= encryptionCount:
		return bad("encryption %d: must be none or aes-256-gcm", p.Encryption)
	}
	for i, pol := range p.Policies {
		if err := pol.check(); err != nil {
			return bad("policy %d %v: %v", i+1, pol, err)
		}
		for j, before := range p.Policies[:i] {
			if pol.C >= before.C && pol.X <= before.X {
				return bad("policy %d %v can never be chosen: it needs %d devices with at most %d per %v, and policy %d %v before it is satisfied with %d and %d",
					i+1, pol, pol.C, pol.X, p.Domain, j+1, before, before.C, before.X)
			}
		}
	}
	return nil
}

func (p Policy) check() error {
	switch {
	case p.K < 1 || p.K > MaxK:
		return fmt.Errorf("k is %d: must be 1 to %d", p.K, MaxK)
	case p.M < 0 || p.M > MaxM:
		return fmt.Errorf("m is %d: must be 0 to %d", p.M, MaxM)
	case p.C < p.K:
		return fmt.Errorf("c is %d: must be at least k (%d), fewer fragments can't be read back", p.C, p.K)
	case p.C > p.Shards():
		return fmt.Errorf("c is %d: must be at most k+m (%d), there are no more fragments", p.C, p.Shards())
	case p.X < 1 || p.X > p.Shards():
		return fmt.Errorf("x is %d: must be 1 to k+m (%d)", p.X, p.Shards())
	}
	return nil
}

// Warnings names what is allowed but loses data more easily than it looks.
func (p *Preset) Warnings() []string {
	var list []string
	for i, pol := range p.Policies {
		switch {
		case pol.M == 0:
			list = append(list, fmt.Sprintf("policy %d %v has no parity: the loss of any disk loses objects", i+1, pol))
		case pol.X > pol.M && p.Domain != DomainDisk:
			list = append(list, fmt.Sprintf("policy %d %v: the loss of one %v can take %d fragments, more than the %d that may be lost", i+1, pol, p.Domain, pol.X, pol.M))
		case pol.C == pol.K:
			list = append(list, fmt.Sprintf("policy %d %v acknowledges objects that the loss of one more disk would lose (c = k)", i+1, pol))
		}
	}
	return list
}
