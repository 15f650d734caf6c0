package remote

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
)

// PlaintextWords is what Security.AllowPlaintext must say.
const PlaintextWords = "unencrypted and unauthenticated"

// ErrInsecure: plain TCP to or on an address that others can reach.
var ErrInsecure = errors.New("refused without TLS")

// Security is how a connection is protected. With CertFile, KeyFile and CAFile
// both sides prove with certificates of that CA who they are (mutual TLS 1.3).
// Without any of them the connection is plain TCP, and then only on loopback
// unless AllowPlaintext says PlaintextWords.
//
// The files are read at each handshake, so new certificates need no restart.
type Security struct {
	CertFile, KeyFile, CAFile string
	AllowPlaintext            string
	// ServerName is the name that a client wants in the server's certificate;
	// "" means the host of the address.
	ServerName string
}

// Check returns an error if the settings contradict themselves or the files
// can't be read.
func (s *Security) Check() error {
	if s.AllowPlaintext != "" && s.AllowPlaintext != PlaintextWords {
		return fmt.Errorf("allow-plaintext: %q, want %q or nothing", s.AllowPlaintext, PlaintextWords)
	}
	if !s.tls() {
		return nil
	}
	if s.CertFile == "" || s.KeyFile == "" || s.CAFile == "" {
		return errors.New("TLS: certificate, key and CA are needed, all three or none")
	}
	if _, err := s.certificate(); err != nil {
		return err
	}
	_, err := s.authorities()
	return err
}

func (s *Security) tls() bool { return s.CertFile != "" || s.KeyFile != "" || s.CAFile != "" }

func (s *Security) certificate() (*tls.Certificate, error) {
	c, err := tls.LoadX509KeyPair(s.CertFile, s.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("TLS certificate: %w", err)
	}
	return &c, nil
}

func (s *Security) authorities() (*x509.CertPool, error) {
	pem, err := os.ReadFile(s.CAFile)
	if err != nil {
		return nil, fmt.Errorf("TLS CA: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("TLS CA: no certificate in %s", s.CAFile)
	}
	return pool, nil
}

// plaintextOK says whether plain TCP with this address is allowed.
func (s *Security) plaintextOK(addr net.Addr) error {
	if tcp, ok := addr.(*net.TCPAddr); ok && tcp.IP.IsLoopback() || s.AllowPlaintext == PlaintextWords {
		return nil
	}
	return fmt.Errorf("%w: %s is no loopback address: configure certificate, key and CA, or allow-plaintext = %q", ErrInsecure, addr, PlaintextWords)
}

// Listen listens on a TCP address, HOST:PORT, as Security allows.
func Listen(addr string, s Security) (net.Listener, error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	if !s.tls() {
		// Before the port is open, not after.
		resolved, err := net.ResolveTCPAddr("tcp", addr)
		if err != nil {
			return nil, fmt.Errorf("listen on %s: %w", addr, err)
		}
		if err := s.plaintextOK(resolved); err != nil {
			return nil, err
		}
		return net.ListenTCP("tcp", resolved)
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	return tls.NewListener(ln, s.serverConfig()), nil
}

func (s *Security) serverConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			cert, err := s.certificate()
			if err != nil {
				return nil, err
			}
			pool, err := s.authorities()
			if err != nil {
				return nil, err
			}
			return &tls.Config{
				MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*cert},
				ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
			}, nil
		},
	}
}

// clientConfig is for a connection to host.
func (s *Security) clientConfig(host string) (*tls.Config, error) {
	cert, err := s.certificate()
	if err != nil {
		return nil, err
	}
	pool, err := s.authorities()
	if err != nil {
		return nil, err
	}
	if s.ServerName != "" {
		host = s.ServerName
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*cert}, RootCAs: pool, ServerName: host}, nil
}
