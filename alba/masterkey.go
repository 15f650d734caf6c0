package alba

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// KeyBytes is the size of master keys and of namespaces' keys.
const KeyBytes = 32

// Errors of keys.
var (
	// ErrNoKey: no master key is configured, or not the one that is needed.
	ErrNoKey = errors.New("master key is missing")
	// ErrKey: a file of master keys or a wrapped key is damaged.
	ErrKey = errors.New("invalid key")
)

// WrappedKey is a namespace's key, encrypted with AES-256-GCM by a master key and
// bound to the namespace.
type WrappedKey struct {
	Master string `json:"master"` // which master key: the first 8 bytes of a hash of it, in hex
	Nonce  []byte `json:"nonce"`
	Sealed []byte `json:"sealed"`
	// Rotations counts how often it was wrapped anew. Of several copies of a namespace's
	// record, the one with the most has the key that is in use.
	Rotations int `json:"rotations,omitempty"`
}

// MasterKeys wraps the keys of namespaces. The first key wraps, all unwrap: so a
// master key is replaced by putting a new one in front, rotating, and then
// removing the old one. A nil MasterKeys has no key. Immutable.
type MasterKeys struct{ keys []masterKey }

type masterKey struct {
	id   string
	aead cipher.AEAD
}

// ParseMasterKeys parses a file of master keys: one per line, 64 hex digits each;
// empty lines and lines that begin with # are skipped.
func ParseMasterKeys(text []byte) (*MasterKeys, error) {
	m := new(MasterKeys)
	for i, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		// The error must not show what may be a key.
		key, err := hex.DecodeString(line)
		if err != nil || len(key) != KeyBytes {
			return nil, fmt.Errorf("master keys: line %d: must be %d hex digits: %w", i+1, 2*KeyBytes, ErrKey)
		}
		sum := sha256.Sum256(append([]byte("scoria master key id 1\n"), key...))
		m.keys = append(m.keys, masterKey{id: hex.EncodeToString(sum[:8]), aead: newGCM(key)})
	}
	if len(m.keys) == 0 {
		return nil, fmt.Errorf("master keys: no key, must have one line of %d hex digits: %w", 2*KeyBytes, ErrKey)
	}
	return m, nil
}

// LoadMasterKeys reads a file of master keys. Where is its path, or
// "credential:NAME" for the systemd credential of that name.
func LoadMasterKeys(where string) (*MasterKeys, error) {
	path := where
	if name, ok := strings.CutPrefix(where, "credential:"); ok {
		dir := os.Getenv("CREDENTIALS_DIRECTORY")
		if dir == "" {
			return nil, fmt.Errorf("master keys: %s: systemd passed no credentials (CREDENTIALS_DIRECTORY is not set): %w", where, ErrNoKey)
		}
		if name == "" || name != filepath.Base(name) || name[0] == '.' {
			return nil, fmt.Errorf("master keys: credential %q: must be a plain name: %w", name, ErrName)
		}
		path = filepath.Join(dir, name)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("master keys: %w", err)
	}
	m, err := ParseMasterKeys(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return m, nil
}

// Current is the ID of the key that wraps, "" if there is none.
func (m *MasterKeys) Current() string {
	if m == nil {
		return ""
	}
	return m.keys[0].id
}

// NewKey returns a wrapped random key for the namespace.
func (m *MasterKeys) NewKey(ns ID) (*WrappedKey, error) {
	key := make([]byte, KeyBytes)
	_, _ = rand.Read(key)
	return m.wrap(ns, key)
}

func (m *MasterKeys) wrap(ns ID, key []byte) (*WrappedKey, error) {
	if m == nil {
		return nil, fmt.Errorf("namespace %v needs encryption: %w", ns, ErrNoKey)
	}
	k := m.keys[0]
	w := &WrappedKey{Master: k.id, Nonce: make([]byte, k.aead.NonceSize())}
	_, _ = rand.Read(w.Nonce)
	w.Sealed = k.aead.Seal(nil, w.Nonce, key, ns[:])
	return w, nil
}

// Unwrap returns the namespace's key: ErrNoKey if its master key is not among
// these, ErrKey if it is damaged or another namespace's.
func (m *MasterKeys) Unwrap(ns ID, w *WrappedKey) ([]byte, error) {
	if w == nil {
		return nil, fmt.Errorf("namespace %v has no key: %w", ns, ErrKey)
	}
	if m != nil {
		for _, k := range m.keys {
			if k.id != w.Master {
				continue
			}
			if len(w.Nonce) != k.aead.NonceSize() {
				return nil, fmt.Errorf("key of namespace %v: nonce of %d bytes, must have %d: %w", ns, len(w.Nonce), k.aead.NonceSize(), ErrKey)
			}
			key, err := k.aead.Open(nil, w.Nonce, w.Sealed, ns[:])
			if err != nil || len(key) != KeyBytes {
				return nil, fmt.Errorf("key of namespace %v is damaged: %w", ns, ErrKey)
			}
			return key, nil
		}
	}
	return nil, fmt.Errorf("key of namespace %v is wrapped by master key %s: %w", ns, w.Master, ErrNoKey)
}

// Rewrap returns the key wrapped by the current master key; w itself if it is already.
func (m *MasterKeys) Rewrap(ns ID, w *WrappedKey) (*WrappedKey, error) {
	key, err := m.Unwrap(ns, w)
	if err != nil || w.Master == m.Current() {
		return w, err
	}
	again, err := m.wrap(ns, key)
	if err == nil {
		again.Rotations = w.Rotations + 1
	}
	return again, err
}

func newGCM(key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(fmt.Sprintf("alba: AES key of %d bytes: %v", len(key), err)) // all callers have 32
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(fmt.Sprintf("alba: GCM: %v", err))
	}
	return aead
}
